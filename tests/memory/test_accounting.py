"""Exact byte counts on modules small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peft_s2a.memory import kept_bytes_by_allocator, saved_activation_bytes, saved_tensors

FLOAT = 4  # bytes


class Scale(nn.Module):
    """A trainable entry: keeps only the batch, which is not counted."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class KeepSigns(torch.autograd.Function):
    """ReLU that keeps one byte an element."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward((x > 0).to(torch.uint8))
        return x.relu()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return grad_output * mask


def after_scale(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(Scale(8), *modules)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


NUMEL = 3 * 8


@pytest.mark.parametrize(
    ("modules", "elements"),
    [
        pytest.param([], 0, id="bias keeps nothing"),
        pytest.param([nn.GELU()], NUMEL, id="gelu keeps its input"),
        pytest.param([nn.ReLU()], NUMEL, id="relu keeps its output"),
        pytest.param([nn.ReLU(), nn.ReLU()], 2 * NUMEL, id="two outputs"),
        pytest.param([frozen(nn.Linear(8, 5))], 0, id="frozen linear keeps only its weight"),
        pytest.param([nn.Linear(8, 5)], NUMEL, id="linear keeps its input"),
        pytest.param([nn.Tanh(), nn.Linear(8, 5)], NUMEL, id="output of one, input of the next: one storage"),
        pytest.param([nn.LayerNorm(8)], NUMEL + 3 + 3, id="layer norm keeps input, mean, rstd"),
        pytest.param([Lambda(lambda x: x * x)], NUMEL, id="the same tensor twice"),
        pytest.param([Lambda(lambda x: x[:1].exp() + x[1:2].sin())], 8 + NUMEL, id="a view keeps its whole storage"),
        pytest.param([Lambda(lambda x: x.view(-1).relu_())], NUMEL, id="in place on a view"),
        pytest.param([Lambda(lambda x: x.exp().detach())], 0, id="nothing is kept of a detached graph"),
    ],
)
def test_elements_kept(modules: list[nn.Module], elements: int, batch: Tensor) -> None:
    assert saved_activation_bytes(after_scale(*modules), batch) == elements * FLOAT


def test_the_batch_and_its_views_are_not_counted(batch: Tensor) -> None:
    model = nn.Linear(8, 5)
    assert saved_activation_bytes(model, batch) == 0
    assert saved_activation_bytes(nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 5)), batch) == 0
    assert saved_activation_bytes(model, batch.double().float()) == 0


def test_buffers_are_not_counted(batch: Tensor) -> None:
    model = after_scale()
    model.register_buffer("table", torch.ones(8))
    model.append(Lambda(lambda x: x * model.table))
    assert saved_activation_bytes(model, batch) == 0


def test_batch_types_give_the_same_count(batch: Tensor) -> None:
    model = after_scale(nn.GELU())
    expected = saved_activation_bytes(model, batch)
    assert expected == NUMEL * FLOAT
    assert saved_activation_bytes(model, (batch,)) == expected
    assert saved_activation_bytes(model, [batch]) == expected
    assert saved_activation_bytes(model, {"input": batch}) == expected
    with pytest.raises(TypeError, match="not str"):
        saved_activation_bytes(model, "batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_follow_the_dtype(dtype: torch.dtype, batch: Tensor) -> None:
    model = after_scale(nn.GELU()).to(dtype)
    assert saved_activation_bytes(model, batch.to(dtype)) == NUMEL * dtype.itemsize


def test_custom_function(batch: Tensor) -> None:
    model = after_scale(Lambda(KeepSigns.apply))
    (saved,) = saved_tensors(model, batch)
    assert (saved.shape, saved.dtype, saved.bytes) == ((3, 8), torch.uint8, NUMEL)
    assert saved.operator == "KeepSignsBackward"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_keeps_its_input(use_reentrant: bool, batch: Tensor) -> None:
    inner = nn.Sequential(nn.GELU(), nn.Linear(8, 8), nn.Tanh())
    plain = after_scale(nn.Sigmoid(), inner)
    model = after_scale(nn.Sigmoid(), Lambda(lambda x: checkpoint(inner, x, use_reentrant=use_reentrant)))
    assert saved_activation_bytes(plain, batch) == 3 * NUMEL * FLOAT
    assert saved_activation_bytes(model, batch) == NUMEL * FLOAT


def test_hooks_inside_the_model_count_what_they_keep(batch: Tensor) -> None:
    def forward(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: (t.shape, {"codes": t.to(torch.uint8)}), lambda p: p[1]["codes"].float()):
            return x.exp()

    (saved,) = saved_tensors(after_scale(Lambda(forward)), batch)
    assert saved.packed
    assert (saved.dtype, saved.bytes, saved.operator, saved.module) == (torch.uint8, NUMEL, "ExpBackward0", "1")


def test_activations_offloaded_by_torch_are_counted(batch: Tensor) -> None:
    def forward(x: Tensor) -> Tensor:
        with save_on_cpu():
            return x.exp()

    assert saved_activation_bytes(after_scale(Lambda(forward)), batch) == NUMEL * FLOAT


def test_hooks_around_the_measurement_come_back() -> None:
    enter = saved_tensors_hooks.__enter__
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        saved_activation_bytes(after_scale(nn.GELU()), torch.ones(1, 8))
        assert packed == []
        torch.ones(2, requires_grad=True).exp()
    assert packed == [(2,)]
    assert saved_tensors_hooks.__enter__ is enter


def test_breakdown_names_modules_and_operators(batch: Tensor) -> None:
    model = after_scale(nn.Sequential(nn.GELU(), nn.Linear(8, 5)))
    saved = saved_tensors(model, batch)
    assert [(s.module, s.operator, s.shape) for s in saved] == [
        ("1.0", "GeluBackward0", (3, 8)),
        ("1.1", "AddmmBackward0", (3, 8)),
    ]
    assert {s.device.type for s in saved} == {"cpu"}
    assert not any(s.packed for s in saved)


def test_what_a_module_saves_after_its_child_counts_for_the_module(batch: Tensor) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = after_scale(nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x).exp()

    saved = saved_tensors(nn.Sequential(Parent()), batch)
    assert [(s.module, s.operator) for s in saved] == [("0.child.1", "GeluBackward0"), ("0", "ExpBackward0")]


def test_fake_tensors(batch: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = after_scale(nn.GELU(), nn.Tanh())
        assert saved_activation_bytes(model, torch.randn(3, 8)) == 2 * NUMEL * FLOAT


class Stateful(nn.Module):
    """Everything a training forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen_norm = nn.BatchNorm1d(8).eval()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.training
        assert torch.is_grad_enabled()
        return self.dropout(self.frozen_norm(self.norm(self.linear(x))))


@pytest.mark.parametrize("measure", [saved_activation_bytes, kept_bytes_by_allocator])
def test_the_model_is_put_back(measure, batch: Tensor) -> None:
    model = Stateful()
    model.norm.eval()
    model.linear.weight.grad = gradient = torch.ones(8, 8)
    buffers = dict(model.named_buffers())
    contents = {name: buffer.clone() for name, buffer in buffers.items()}
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        measure(model, batch)
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == flags
    assert model.linear.weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, contents[name]), name


def test_the_model_is_put_back_after_an_error(batch: Tensor) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    model = nn.Sequential(nn.BatchNorm1d(8), Lambda(fail)).eval()
    enter = saved_tensors_hooks.__enter__
    with pytest.raises(RuntimeError, match="no"):
        saved_activation_bytes(model, batch)
    assert not any(module.training for module in model.modules())
    assert model[0].num_batches_tracked == 0
    assert saved_tensors_hooks.__enter__ is enter


def test_buffers_that_did_not_change_are_not_written(batch: Tensor) -> None:
    model = nn.Sequential(Scale(8), nn.BatchNorm1d(8, momentum=0.0))
    model.register_buffer("table", torch.ones(8))
    version = model.table._version
    saved_activation_bytes(model, batch)
    assert model.table._version == version


@pytest.mark.parametrize(
    "modules",
    [[nn.GELU()], [nn.LayerNorm(8), nn.Linear(8, 5)], [Lambda(KeepSigns.apply)], [nn.Dropout(0.5)]],
    ids=["gelu", "norm and linear", "custom function", "dropout"],
)
def test_allocator_agrees_up_to_outputs_and_loss(modules: list[nn.Module], batch: Tensor) -> None:
    model = after_scale(*modules)
    kept = saved_activation_bytes(model, batch)
    assert kept_bytes_by_allocator(model, batch) == kept + model(batch).nbytes + FLOAT  # the loss is one number


def test_allocator_sees_what_is_hidden_from_autograd(batch: Tensor) -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.codes = x.to(torch.uint8)
            return x * 1.0

        @staticmethod
        def backward(ctx, grad_output: Tensor) -> Tensor:
            return grad_output

    model = after_scale(Lambda(Hidden.apply))
    assert saved_activation_bytes(model, batch) == 0
    assert kept_bytes_by_allocator(model, batch) == NUMEL + NUMEL * FLOAT + FLOAT


def test_allocator_needs_something_trainable(batch: Tensor) -> None:
    with pytest.raises(ValueError, match="trainable"):
        kept_bytes_by_allocator(frozen(nn.Linear(8, 8)), batch)
    assert saved_activation_bytes(frozen(nn.Linear(8, 8)), batch) == 0
