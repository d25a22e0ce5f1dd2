"""What changes in a configuration: values that are set, keys that are removed."""

from __future__ import annotations

import json

import pytest

from lora_merge.core.checkpoint import ConfigPatch, SideFile, patched_config
from lora_merge.core.plan import MergePlan
from lora_merge.formats.provenance import Provenance
from lora_merge.merging.hf_checkpoint import seal
from lora_merge.storage.folder import Folder

CONFIG = {
    "a": 1,
    "quantization_config": {"bits": 4},
    "text_config": {"quantization_config": {}, "size": 2},
    "z": None,
}


@pytest.mark.parametrize(
    ("patch", "wanted"),
    [
        (ConfigPatch(), CONFIG),
        (ConfigPatch(delete=("quantization_config",)), {k: v for k, v in CONFIG.items() if k[0] != "q"}),
        (
            ConfigPatch({"text_config.size": 3, "new.deep": 4}, ("text_config.quantization_config", "z")),
            {"a": 1, "quantization_config": {"bits": 4}, "text_config": {"size": 3}, "new": {"deep": 4}},
        ),
        (ConfigPatch(delete=("nothing", "a.b", "text_config.nothing.deeper")), CONFIG),
    ],
)
def test_keys_are_set_and_removed_at_every_level_and_the_rest_keeps_its_order(patch, wanted):
    before = json.dumps(CONFIG)
    assert json.dumps(patched_config(CONFIG, patch)) == json.dumps(wanted)
    assert json.dumps(CONFIG) == before


def test_a_patch_says_which_files_it_changes():
    assert ConfigPatch(delete=("a",)).changes("config.json")
    assert ConfigPatch({"a": None}).changes("config.json")
    assert not ConfigPatch().changes("config.json")
    of_side_file = ConfigPatch(files={"hf_quant_config.json": {}})
    assert of_side_file.changes("hf_quant_config.json")
    assert not of_side_file.changes("config.json")


def test_an_output_has_a_config_without_what_is_removed(tmp_path):
    source, out = tmp_path / "config.json", tmp_path / "out"
    source.write_text(json.dumps(CONFIG))
    out.mkdir()
    side = SideFile("config.json", str(source), source.stat().st_size, "base")
    patch = ConfigPatch({"a": 5}, ("quantization_config", "text_config.quantization_config"))
    plan = MergePlan("base", (), (), (), (), (side,), patch, "", ())
    assert MergePlan.from_json(plan.to_json()) == plan
    provenance = Provenance("base", (), (), "out", {}, {"lora-merge": "0"})
    seal(Folder.of(out), plan, [], provenance)
    assert json.loads((out / "config.json").read_text()) == {"a": 5, "text_config": {"size": 2}, "z": None}
