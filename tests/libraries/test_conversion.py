"""transformers' conversions: what the rules of `layouts` presuppose of them, and names both ways."""

from __future__ import annotations

import pytest
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from lora_merge.modeling.conversion import Conversion, ConversionError
from lora_merge.modeling.pieces import Assembly, UnknownOperationError
from tests.parity import family_building
from tests.parity.families import FAMILIES

MAPPINGS = _build_checkpoint_conversion_mapping()
CONVERTERS = [
    (family, transform)
    for family, transforms in MAPPINGS.items()
    for transform in transforms
    if isinstance(transform, WeightConverter)
]


def plain(pattern):
    return pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")


def test_a_name_that_a_conversion_keeps_means_experts_that_are_turned_by_their_shape():
    """So the rule ``identity`` needs no look at conversions: shapes tell, or the square is refused."""
    keeping = [
        (family, converter)
        for family, converter in CONVERTERS
        if set(map(plain, converter.source_patterns)) & set(map(plain, converter.target_patterns))
    ]
    assert {family for family, _ in keeping} == {"qwen3_vl_moe"}
    for _, converter in keeping:
        assert [type(operation) for operation in converter.operations] == [Transpose]
        assert converter.operations[0].check_dims
        assert all("experts" in pattern for pattern in converter.source_patterns)


@pytest.fixture(scope="module")
def mixtral():
    family = family_building.by_name("Mixtral")
    config = {**family_building.made("Mixtral").config.to_dict(), "architectures": [family.architecture]}
    return Conversion.of(config)


def test_a_tensor_of_an_expert_has_its_place_in_the_stack(mixtral):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    target = "model.layers.1.mlp.experts.gate_up_proj"
    assert mixtral.canonical(name)[0] == target
    n_experts, twice, hidden = mixtral.shape(target)
    ((parameter, (piece,)),) = mixtral.parts_of(name, (twice // 2, hidden)).items()
    assert parameter == target
    assert piece.box() == ((2, 3), (twice // 2, twice), (0, hidden))
    assert n_experts > 3  # the third of them is not the last


def test_a_tensor_of_another_size_has_none(mixtral):
    with pytest.raises(ConversionError, match=r"is not a part of .*gate_up_proj"):
        mixtral.parts_of("model.layers.1.block_sparse_moe.experts.2.w3.weight", (7, 9))


def test_an_unknown_operation_is_named():
    """Inkling's gates and ups lie row by row in turn: that is a new order, and no box."""
    assert any(type(operation).__name__ == "Interleave" for _, c in CONVERTERS for operation in c.operations)
    interleave = next(c for _, c in CONVERTERS if type(c.operations[0]).__name__ == "Interleave")
    pattern = interleave.source_patterns[0]
    interleave.add_tensor("parameter", "stored", pattern, Assembly.whole("stored", (4, 6, 8)))
    with pytest.raises(UnknownOperationError, match="reshape is not known"):
        interleave.convert("parameter", model=None, config=None)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_parameter_is_where_loading_puts_it(name):
    """For every family: what is stored as published, laid into the model, is the model."""
    import torch

    family = family_building.by_name(name)
    model = family_building.made(name)
    config = {**model.config.to_dict(), "architectures": [family.architecture]}
    stored = family_building.tensors(model, family, "published")
    conversion = Conversion.of(config)
    memory = conversion.memory({key: tuple(tensor.shape) for key, tensor in stored.items()})
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for parameter, value in model.state_dict().items():
        assembly = memory.assembly(parameter)
        if assembly is None:
            assert parameter in tied or parameter in tied.values(), parameter
            continue
        whole = torch.full(assembly.shape, float("nan"))
        for piece in assembly.pieces:
            box = piece.part_box(piece.box())
            content = stored[piece.part].float()[tuple(slice(*limits) for limits in box)]
            place = tuple(
                slice(span.start, span.end) if span.axis is not None else span.start for span in piece.spans
            )
            whole[place] = content.permute(piece.part_axes()) if content.dim() > 1 else content
        assert torch.equal(whole, value.float()), parameter
        if conversion.canonical(parameter) == (parameter, None):
            assert conversion.canonical(conversion.spelled(parameter))[0] == parameter
