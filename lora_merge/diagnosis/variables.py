"""Environment variables that change what lora-merge does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from lora_merge.diagnosis.facts import Variable
from lora_merge.native.library import SWITCH
from lora_merge.redaction import VARIABLES, fit

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAMES: Final = (
    SWITCH,
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "HF_XET_HIGH_PERFORMANCE",
    "XDG_CACHE_HOME",
    "MODELSCOPE_CACHE",
    "MODELSCOPE_DOMAIN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "LORA_MERGE_ENGINE_PYTHON",
    "TMPDIR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "NO_COLOR",
    "COLUMNS",
    "LANG",
    "LC_ALL",
)


def variables(environ: Mapping[str, str] = os.environ) -> tuple[Variable, ...]:
    """Return the variables that are set. The value of a token is never returned, and no password of a proxy."""
    plain = [Variable(name, fit(environ[name])) for name in _NAMES if environ.get(name)]
    return (*plain, *(Variable(name, "(set)") for name in VARIABLES if environ.get(name)))
