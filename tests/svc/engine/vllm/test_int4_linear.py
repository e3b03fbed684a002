"""Tests the 4-bit kernel: outputs equal those of the dequantized weights, for all groups and every load."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow  # vLLM's import takes some ten seconds

WRITTEN = (32, 64, 128, -1)
"""Group sizes that this project's quantizer writes, plus the one for whole channels."""


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Import vLLM before hypothesis starts measuring time."""
    import_module("svc.engine.vllm.int4_linear")


def config(inputs: int, outputs: int, group_size: int, *, awq: bool = False) -> Any:
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    shape = (inputs, outputs)
    weights = scalar_types.uint4 if awq else scalar_types.uint4b8
    return MPLinearLayerConfig(shape, shape, weights, torch.bfloat16, group_size, zero_points=awq)


def pack_eights(values: Any) -> Any:
    """Return eight rows in an integer, the first in its lowest bits."""
    import torch

    eights = values.reshape(-1, 8, values.shape[1]).to(torch.int64)
    packed = sum(eights[:, place] << (4 * place) for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


class Layer:
    """A quantized layer in vLLM's form, with its weights in float32."""

    def __init__(self, inputs: int, outputs: int, group_size: int, seed: int = 0, *, awq: bool = False) -> None:
        import torch

        from svc.engine.vllm.int4_linear import Int4LinearKernel

        self.group = inputs if group_size == -1 else group_size
        self.module = torch.nn.Module()
        self.kernel = Int4LinearKernel(config(inputs, outputs, group_size, awq=awq), "qweight", "scales", "qzeros")
        self.inputs, self.outputs, self.awq = inputs, outputs, awq
        self.load(seed)

    def load(self, seed: int) -> None:
        """Load as vLLM does at a start and at an in-place reload: parameters in GPTQ's layout, then the kernel's."""
        import torch

        random = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 16, (self.inputs, self.outputs), generator=random, dtype=torch.int32)
        scales = torch.rand(self.inputs // self.group, self.outputs, generator=random).add(0.1).to(torch.bfloat16)
        points = torch.full((len(scales), self.outputs), 8, dtype=torch.int32)
        if self.awq:
            points = torch.randint(0, 16, points.shape, generator=random, dtype=torch.int32)
            scales = scales.log2().round().exp2()  # so that the offsets are exact in bfloat16, too
        # vLLM gives the kernel AWQ's zero points with the outputs first, and GPTQ's, which it ignores, as stored.
        zeros = pack_eights(points.T) if self.awq else torch.zeros(len(scales), self.outputs // 8, dtype=torch.int32)
        for name, value in (("qweight", pack_eights(values)), ("scales", scales), ("qzeros", zeros)):
            if name in self.module._parameters:
                del self.module._parameters[name]
            self.module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        repeated = points.repeat_interleave(self.group, dim=0)
        self.weights = (values - repeated).float() * scales.float().repeat_interleave(self.group, dim=0)
        self.kernel.process_weights_after_loading(self.module)

    def check(self, rows: int, bias: Any = None) -> None:
        """Check that the outputs differ from those of the float32 weights by no more than bfloat16 rounding."""
        import torch

        x = torch.randn(rows, self.inputs, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        found = self.kernel.apply_weights(self.module, x, bias)
        product = x.float() @ self.weights
        expected = product if bias is None else product + bias.float()
        assert found.dtype == torch.bfloat16
        assert found.shape == (rows, self.outputs)
        # Half a unit of bfloat16's last place for the product, and as much for its sum with a bias; and a little for
        # the order in which float32 adds up.
        bound = product.abs() * 2**-8 + (0 if bias is None else expected.abs() * 2**-8)
        bound += product.abs().mean() * 2**-12
        assert ((found.float() - expected).abs() <= bound).all()


@pytest.mark.parametrize(("group_size", "rows"), zip(WRITTEN, (1, 3, 8, 65), strict=True))
def test_int4_outputs_equal_the_outputs_of_dequantized_weights(group_size: int, rows: int) -> None:
    Layer(256, 192, group_size).check(rows)


@pytest.mark.parametrize(("group_size", "rows"), zip(WRITTEN, (1, 3, 8, 65), strict=True))
def test_int4_outputs_with_zero_points_equal_the_outputs_of_dequantized_weights(group_size: int, rows: int) -> None:
    layer = Layer(256, 192, group_size, awq=True)
    layer.check(rows)
    layer.load(seed=5)
    layer.check(rows)


@given(
    groups=st.integers(1, 6),
    group_size=st.sampled_from([32, 64, 96, 128, 160, 256, 512]),
    blocks=st.integers(1, 9),
    rows=st.integers(1, 9),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_int4_outputs_are_correct_for_all_supported_shapes(
    groups: int, group_size: int, blocks: int, rows: int, seed: int
) -> None:
    from svc.engine.vllm.int4_linear import Int4LinearKernel

    inputs, outputs = groups * group_size, blocks * 32
    assert Int4LinearKernel.can_implement(config(inputs, outputs, group_size)) == (True, None)
    Layer(inputs, outputs, group_size, seed).check(rows)


def test_int4_layer_adds_its_bias_to_the_output() -> None:
    import torch

    Layer(64, 64, 32).check(5, torch.randn(64).to(torch.bfloat16))


def test_int4_layer_accepts_inputs_with_any_number_of_dimensions() -> None:
    import torch

    layer = Layer(64, 96, 32)
    x = torch.randn(2, 3, 64).to(torch.bfloat16)
    found = layer.kernel.apply_weights(layer.module, x)
    assert torch.equal(found.view(6, 96), layer.kernel.apply_weights(layer.module, x.view(6, 64)))


@pytest.mark.parametrize("group_size", WRITTEN)
def test_int4_layer_uses_the_new_weights_after_an_inplace_reload(group_size: int) -> None:
    layer = Layer(256, 64, group_size)
    layer.load(seed=7)
    layer.check(4)
    layer.load(seed=0)
    layer.check(4)


def test_int4_layer_keeps_its_weights_in_4_bits() -> None:
    layer = Layer(256, 128, 64)
    assert layer.module.qweight.untyped_storage().nbytes() == 256 * 128 // 2
    assert layer.module.scales.untyped_storage().nbytes() == 256 * 128 // 64 * 4
    assert layer.module.qzeros is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "told"),
    [
        (48, 64, -1, "48 x 64"),
        (64, 40, 32, "64 x 40"),
        (64, 64, 16, "the group size is 16"),
        (96, 64, 48, "the group size is 48"),
    ],
)
def test_unsupported_int4_shapes_are_rejected_with_a_reason(
    inputs: int, outputs: int, group_size: int, told: str
) -> None:
    from svc.engine.vllm.int4_linear import Int4LinearKernel

    able, reason = Int4LinearKernel.can_implement(config(inputs, outputs, group_size))
    assert not able
    assert told in str(reason)


def test_unsupported_int4_weight_and_activation_types_are_rejected() -> None:
    import torch
    from vllm.scalar_type import scalar_types

    from svc.engine.vllm.int4_linear import Int4LinearKernel

    fine = config(64, 64, 32)
    others = (
        replace(fine, weight_type=scalar_types.uint8b128),
        replace(fine, zero_points=True),
        replace(fine, act_type=torch.float16),
    )
    assert [Int4LinearKernel.can_implement(other)[0] for other in others] == [False, False, False]
