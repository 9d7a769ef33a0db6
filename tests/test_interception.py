"""The operators take the place of torch's functions in training, and only there."""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import CheckpointError, checkpoint

from peft_s2a.interception import ActivationInterceptor
from peft_s2a.settings import ActivationSettings

B, L, D, H = 3, 16, 64, 4


class Block(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.1)
        self.gated = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, H, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(mixed))
        hidden = self.down(F.gelu(self.up(self.norm2(x))))
        return x + self.relu(hidden + 0.0) * (torch.sigmoid(hidden) if self.gated else 1.0)


class Model(nn.Module):
    def __init__(self, checkpointing: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D, 5)
        self.checkpointing = checkpointing
        self.with_mask = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        mask = None
        if self.with_mask:
            rows = torch.linspace(-1, 1, B * L).view(B, 1, L, 1)
            mask = rows + torch.linspace(0, 1, H * L).view(1, H, 1, L)
        for block in self.blocks:
            x = block(x, mask) if self.checkpointing is None else checkpoint(block, x, mask, **self.checkpointing)
        return self.head(x.mean(1))


Attach = Callable[..., ActivationInterceptor]


def attach(model: nn.Module, bits: int | None = 4, blocks: bool = True) -> ActivationInterceptor:
    interceptor = ActivationInterceptor()
    layer = types.SimpleNamespace(disable_adapters=False, active_adapters=["default"])
    interceptor.layer = cast(BaseTunerLayer, layer)
    interceptor.set_adapter_settings("default", ActivationSettings.from_config(bits))
    interceptor.attach(model)
    if blocks and isinstance(model, Model):
        for block in model.blocks:
            interceptor.attach(block)
    return interceptor


def make(seed: int = 0, **options: Any) -> Model:
    torch.manual_seed(seed)
    model = Model(**options)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "shift" or name.endswith("bias"))
    return model


def batch(seed: int = 1) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: Tensor, **backward: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(11)
    output = model(x)
    output.square().sum().backward(**backward)
    assert _len_torch_function_stack() == 0
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    total: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        total[storage.data_ptr()] = storage.nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(size for address, size in total.items() if address not in known)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    error = sum(float((actual[n] - g).square().sum()) for n, g in expected.items())
    return (error / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


def test_training_keeps_less_and_gives_close_gradients() -> None:
    stock, ours = make(), make()
    attach(ours)
    expected_output, expected = step(stock, batch())
    output, gradients = step(ours, batch())
    assert torch.equal(output, expected_output)
    assert 0 < relative_error(gradients, expected) < 0.2
    assert saved_bytes(ours, batch()) < saved_bytes(stock, batch()) / 4


def test_more_bits_are_closer() -> None:
    _, expected = step(make(), batch())
    errors = []
    for bits in (1, 2, 4, 8):
        model = make()
        attach(model, bits)
        errors.append(relative_error(step(model, batch())[1], expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_without_bits_gradients_are_those_of_torch() -> None:
    stock, ours = make(), make()
    attach(ours, bits=None)
    expected_output, expected = step(stock, batch())
    output, gradients = step(ours, batch())
    assert torch.equal(output, expected_output)
    assert_same(gradients, expected)
    assert saved_bytes(ours, batch()) < saved_bytes(stock, batch())  # ReLU and dropout are exact in one bit


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "disabled", "detached"])
def test_elsewhere_the_model_is_untouched(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_s2a import interception

    stock, ours = make(), make()
    interceptor = attach(ours)
    entered: list[object] = []
    monkeypatch.setattr(interception.ActivationMode, "__enter__", lambda self: entered.append(self))
    if how == "eval":
        stock.eval(), ours.eval()
    elif how == "disabled":
        cast(Any, interceptor.layer).disable_adapters = True
    elif how == "detached":
        interceptor.detach()
    if how in ("no_grad", "inference"):
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            torch.manual_seed(0)
            expected = stock(batch())
            torch.manual_seed(0)
            assert torch.equal(ours(batch()), expected)
    else:
        assert saved_bytes(ours, batch()) == saved_bytes(stock, batch())
        expected_output, expected_gradients = step(stock, batch())
        output, gradients = step(ours, batch())
        assert torch.equal(output, expected_output)
        assert_same(gradients, expected_gradients)
    assert not entered


def test_two_forwards_before_one_backward() -> None:
    model = make()
    attach(model)
    model.blocks[0].dropout.p = model.blocks[1].dropout.p = 0.0
    _, first = step(model, batch(1))
    _, second = step(model, batch(2))
    model.zero_grad()
    (model(batch(1)).square().sum() + model(batch(2)).square().sum()).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(together, {n: first[n] + second[n] for n in first}, 1e-4)


def test_retained_graph() -> None:
    model = make()
    attach(model)
    loss = model(batch()).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, {n: 2 * g for n, g in once.items()}
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("with_mask", [False, True])
def test_checkpointed_blocks(reentrant: bool, with_mask: bool) -> None:
    plain, checkpointed = make(), make(checkpointing={"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        attach(model)
        model.with_mask = with_mask
    expected_output, expected = step(plain, batch())
    output, gradients = step(checkpointed, batch())
    assert torch.equal(output, expected_output)
    assert_same(gradients, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_a_block(reentrant: bool) -> None:
    class Inner(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + checkpoint(self.mlp, x, use_reentrant=reentrant)

        def mlp(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(self.norm2(x))))

    model = make()
    model.blocks = nn.ModuleList([Inner().requires_grad_(False)])
    _, expected = step(model, batch())
    attach(model, 8)
    if not reentrant:
        # a method is recomputed without any module being called: torch says that the graphs differ
        with pytest.raises(CheckpointError, match="number of tensors"):
            step(model, batch())
        return
    _, gradients = step(model, batch())
    assert relative_error(gradients, expected) < 0.02


def test_hooks_of_others_still_run_and_see_the_same_values() -> None:
    stock, ours = make(), make()
    seen: dict[str, list[Tensor]] = {"stock": [], "ours": []}
    for name, model in (("stock", stock), ("ours", ours)):
        for module in (model, model.blocks[0], model.blocks[0].norm1):
            module.register_forward_pre_hook(lambda m, a, n=name: seen[n].append(a[0].detach()))
            module.register_forward_hook(lambda m, a, o, n=name: seen[n].append(o.detach()))
        if name == "ours":
            attach(model)
        model.register_forward_hook(lambda m, a, o, n=name: seen[n].append(o.detach()))
        model.blocks[1].register_full_backward_hook(lambda m, gi, go, n=name: seen[n].append(torch.zeros(())))
    step(stock, batch())
    step(ours, batch())
    assert len(seen["ours"]) == len(seen["stock"]) == 8
    for our, their in zip(seen["ours"], seen["stock"], strict=True):
        assert torch.equal(our, their)


def test_saved_tensor_hooks_of_others_see_the_packed_tensors() -> None:
    model = make()
    attach(model)
    _, expected = step(model, batch())
    dtypes: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        dtypes.append(tensor.dtype)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda t: t):
        _, gradients = step(model, batch())
    assert torch.uint8 in dtypes
    assert_same(gradients, expected)
    with save_on_cpu():
        _, gradients = step(model, batch())
    assert_same(gradients, expected)


@pytest.mark.parametrize(
    "where",
    [
        "inside",
        "pre_hook",
        "post_hook",
    ],
)
def test_an_exception_leaves_no_mode_behind(where: str) -> None:
    model = make()
    attach(model)
    _, expected = step(model, batch())

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    target = model.blocks[1]
    if where == "inside":
        handle = target.down.register_forward_hook(fail)
    elif where == "pre_hook":
        handle = target.register_forward_pre_hook(fail, prepend=True)
    else:
        handle = target.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(batch())
    assert _len_torch_function_stack() == 0
    handle.remove()
    _, gradients = step(model, batch())
    assert_same(gradients, expected)


@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_alone(copy: Callable[[Model], Model]) -> None:
    model = make()
    interceptor = attach(model)
    model.with_mask = True
    _, expected = step(model, batch())
    twin = copy(model)
    interceptor.detach()
    exact = step(model, batch())[1]
    _, gradients = step(twin, batch())
    assert_same(gradients, expected)
    assert relative_error(exact, expected) > 0
    assert saved_bytes(twin, batch()) < saved_bytes(model, batch()) / 4


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_parts_of_multihead_attention_are_replaced(need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, H, batch_first=True)
            self.shift = nn.Parameter(torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.shift
            return self.attention(x, x, x, need_weights=need_weights)[0]

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Attention()
        model.attention.requires_grad_(False)
        return model

    stock, exact, ours = build(), build(), build()
    attach(exact, None)
    attach(ours, 8)
    x = torch.randn(4, 40, D, generator=torch.Generator().manual_seed(0))
    expected_output, expected = step(stock, x)
    exact_output, exact_gradients = step(exact, x)
    output, gradients = step(ours, x)
    assert torch.equal(exact_output, expected_output)
    assert torch.equal(output, expected_output)
    assert_same(exact_gradients, expected)
    assert 0 < relative_error(gradients, expected) < 0.05
    assert saved_bytes(ours, x) < saved_bytes(stock, x) / 2


def test_autocast() -> None:
    stock, ours = make(), make()
    attach(ours, 8)
    results = []
    for model in (stock, ours):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch())
        output.float().square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected_output, expected), (output, gradients) = results
    assert output.dtype == expected_output.dtype == torch.bfloat16
    assert torch.equal(output, expected_output)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in expected.items()}
    assert relative_error(gradients, expected) < 0.05


def test_autocast_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8, 1, 1))
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(F.max_pool2d(F.relu(self.norm(self.conv(x + self.shift))), 2), 1).flatten(1)

    results = []
    for bits in ("stock", 8):
        torch.manual_seed(0)
        net = Net()
        net.conv.weight.requires_grad_(False)
        if bits != "stock":
            attach(net, 8)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(torch.randn(2, 8, 12, 12))
        output.float().square().sum().backward()
        results.append((output, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    (expected_output, expected), (output, gradients) = results
    assert output.dtype == expected_output.dtype
    assert torch.equal(output, expected_output)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in expected.items()}
    assert relative_error(gradients, expected) < 0.1


def test_blocks_below_the_first_trained_tensor_keep_nothing() -> None:
    model = make()
    attach(model)
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    assert saved_bytes(model, batch()) == 0


def test_a_python_operand_with_its_own_addition() -> None:
    class Right:
        def __radd__(self, other: Tensor) -> Tensor:
            return other * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x + Right()) + self.shift  # type: ignore[operator]

    net = Net()
    attach(net)
    assert torch.equal(net(torch.ones(3)), torch.full((3,), 2.0))


def test_a_mask_changed_in_place_after_it_was_made() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(D // H))

        def forward(self, x: Tensor) -> Tensor:
            q = x + self.shift
            mask = torch.zeros(B, 1, L, 1) + torch.zeros(1, H, 1, L)
            mask.masked_fill_(torch.ones(L, L, dtype=torch.bool).triu(1), -float("inf"))
            return F.scaled_dot_product_attention(q, q, q, mask)

    x = torch.randn(B, H, L, D // H, generator=torch.Generator().manual_seed(0))
    _, expected = step(Net(), x)
    net = Net()
    attach(net, 8)
    _, gradients = step(net, x)
    assert relative_error(gradients, expected) < 0.05


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_compiled_gradients_are_those_of_eager(with_mask: bool, gated: bool) -> None:
    torch._dynamo.reset()
    eager, compiled = make(), make()
    for model in (eager, compiled):
        attach(model)
        model.with_mask = with_mask
        for block in model.blocks:
            block.dropout.p, block.gated = 0.0, gated
    expected_output, expected = step(eager, batch())
    output, gradients = step(torch.compile(compiled, backend="aot_eager", fullgraph=True), batch())
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
    gradients = {n.removeprefix("_orig_mod."): g for n, g in gradients.items()}
    # sums in another order can move a number over the border of two codes
    assert relative_error(gradients, expected) < 1e-2
