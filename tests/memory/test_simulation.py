"""The predicted memory of a step against the allocator's, and against steps that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_s2a import S2AConfig
from peft_s2a.blockwise import CPU_PIECE
from peft_s2a.codecs.chunked import CPU_CHUNK
from peft_s2a.memory import CannotSimulateError, kept_bytes_by_allocator, peak_step_bytes, simulate_step
from peft_s2a.memory.batch_size import UNLIMITED, PeakByBatch
from peft_s2a.memory.shape_copy import meta_copy

FLOAT = 4  # bytes


def make(family, method: str) -> nn.Module:
    torch.manual_seed(0)
    model = family.make()
    if method == "full":
        return model
    if method == "lora":
        targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != family.head]
        return get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=[family.head]))
    if method == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
        return model
    return get_peft_model(model, S2AConfig(modules_to_save=[family.head], image_size=family.image_size))


CASES = [
    *((name, method) for name in ("hf-vit", "hf-swin", "timm-vit") for method in ("full", "lora", "s2a")),
    *((name, method) for name in ("hf-resnet", "timm-efficientnet", "hf-convnext") for method in ("full", "s2a")),
    ("hf-vit", "checkpointing"),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_as_the_allocator_measures(families, name, method):
    family = families[name]
    model = make(family, method)
    # large enough to dwarf the fixed 1.6 MB that oneDNN takes for the weights' gradient of a patch embedding
    batch = (family.images(96, 64),) if name == "hf-convnext" else (family.images(24),)
    step = simulate_step(model, batch)
    assert step.step_peak == pytest.approx(peak_step_bytes(model, batch), rel=0.1)
    assert step.kept == pytest.approx(kept_bytes_by_allocator(model, batch), rel=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert step.gradients <= sum(p.nbytes for p in trained)
    assert step.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


class Chain(nn.Module):
    """`depth` times exp, each of which keeps its output."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for _ in range(self.depth):
            x = x.exp()
        return x


def test_a_chain_counted_by_hand():
    numel = 1 << 20
    step = simulate_step(Chain(5), torch.empty(numel, device="meta"))
    block = numel * FLOAT
    assert step.kept == 5 * block + FLOAT  # the outputs of exp, and the loss
    # live besides: the gradient of the mean and the one that the last exp makes of it
    assert 7 * block <= step.step_peak <= 7 * block + 64
    assert step.peak == step.step_peak + FLOAT + block  # the shift and the batch
    assert step.gradients == FLOAT
    assert {(a.operator, a.phase, a.kind) for a in step.live_at_peak if a.bytes == block} == {
        ("aten::exp", "forward", "kept"),
        ("aten::div", "backward", "temporary"),
        ("aten::mul", "backward", "temporary"),
    }
    assert step.temporaries == pytest.approx(2 * block, abs=64)


def test_modules_at_the_peak():
    step = simulate_step(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), torch.empty(999, 64))
    kept = [(a.operator, a.module) for a in step.live_at_peak if a.kind == "kept"]
    assert ("aten::addmm", "0") in kept
    assert ("aten::gelu", "1") in kept


def test_the_optimizer():
    model = nn.Linear(512, 512, bias=False)
    weight = 512 * 512 * FLOAT
    step = simulate_step(model, torch.empty(1, 512), torch.optim.AdamW)
    assert step.optimizer == 2 * weight + FLOAT  # two moments and the number of steps
    # the gradient, the root of the second moment, and its quotient
    assert 2 * weight <= step.optimizer_peak <= 3 * weight + 64
    assert step.peak == weight + 512 * FLOAT + step.optimizer + max(step.step_peak, step.optimizer_peak)
    plain = simulate_step(model, torch.empty(1, 512), torch.optim.SGD)
    assert plain.optimizer == 0


def test_flops_by_formula():
    model = nn.Linear(32, 16, bias=False)
    step = simulate_step(model, torch.empty(10, 32))
    assert step.flops == 2 * 2 * 10 * 32 * 16  # forward, and the weight's gradient
    frozen = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16, bias=False).requires_grad_(False))
    both = 2 * 10 * (32 * 32 + 32 * 16)
    assert simulate_step(frozen, torch.empty(10, 32)).flops == 2 * both


def test_attention_has_flops(families):
    model = families["hf-vit"].make()
    images = families["hf-vit"].images(2)
    eager = families["hf-vit"].make()
    eager.set_attn_implementation("eager")
    # flash kernels compute the scores once more in backward
    fused, plain = simulate_step(model, images).flops, simulate_step(eager, images).flops
    assert plain < fused < 1.1 * plain


class Activations(nn.Module):
    """A convolution, then GELUs, whose codes are made and read piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.activations = nn.Sequential(nn.GELU(), nn.GELU(), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(self.conv(x))


@pytest.mark.parametrize("batch", [1, 6, 13])
def test_a_loop_over_pieces_counts_one_piece(batch):
    model = get_peft_model(Activations(), S2AConfig(prompt_rank=0, side_reduction=0, image_size=128))
    images = torch.randn(batch, 3, 128, 128)
    assert (images.numel() // 3 * 16 > 4 * CPU_CHUNK) == (batch > 4)
    assert simulate_step(model, images).step_peak == pytest.approx(peak_step_bytes(model, images), rel=0.01)


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param({"kernel_size": 1}, id="pointwise"),
        pytest.param({"kernel_size": 3, "padding": 1}, id="3x3"),
        pytest.param({"kernel_size": 3, "padding": 1, "stride": 2}, id="strided"),
        pytest.param({"kernel_size": 3, "padding": 1, "groups": 32}, id="depthwise"),
        pytest.param({"kernel_size": 3, "padding": 1, "stride": 2, "groups": 32}, id="strided depthwise"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("batch", [4, 24])
def test_what_convolutions_take_inside(geometry, frozen, batch):
    first = nn.Conv2d(3, 32, 1)
    model = nn.Sequential(first, nn.Conv2d(32, 32, **geometry), nn.Conv2d(32, 32, **geometry))
    model[1:].requires_grad_(not frozen)
    images = torch.randn(batch, 3, 64, 64)
    assert simulate_step(model, images).step_peak == pytest.approx(peak_step_bytes(model, images), rel=0.05)


def test_nothing_of_the_model_changes(families):
    model = make(families["hf-vit"], "s2a").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    parameters[-1].grad = gradient = torch.ones_like(parameters[-1])
    random_state = torch.get_rng_state()
    simulate_step(model, families["hf-vit"].images(2), torch.optim.AdamW)
    assert not model.training
    assert parameters[-1].grad is gradient
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert simulate_step(model, families["hf-vit"].images(2)) == simulate_step(model, families["hf-vit"].images(2))


def test_no_real_memory_is_needed():
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1 << 17, 1 << 17) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    with torch.device("meta"):
        model = Huge()
    step = simulate_step(model, torch.empty(64, 1 << 17, device="meta"), torch.optim.AdamW)
    assert step.weights == 4 * ((1 << 34) + (1 << 17)) * FLOAT
    assert step.peak > 4 * step.weights


def test_a_model_that_needs_data():
    class Looks(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x * self.shift

    with pytest.raises(CannotSimulateError, match="Looks cannot be simulated.*peak_step_bytes"):
        simulate_step(Looks(2), torch.ones(8))


def test_a_forward_that_belongs_to_another_object():
    model = nn.Linear(4, 4)
    original = model.forward
    model.forward = lambda x: original(x)
    with pytest.raises(CannotSimulateError, match="does not follow a copy"):
        simulate_step(model, torch.ones(2, 4))
    assert model.weight.grad is None


def test_nothing_to_train():
    with pytest.raises(ValueError, match="trainable"):
        simulate_step(Chain(1).requires_grad_(False), torch.ones(8))


def test_copies_share_what_the_model_shares():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    copied = meta_copy(model)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.is_meta
    assert not copied[0].weight.requires_grad
    assert copied[1].bias.requires_grad
    assert not model[0].weight.is_meta


@pytest.mark.parametrize(
    ("name", "method"), [("hf-vit", "full"), ("hf-vit", "s2a"), ("hf-swin", "s2a"), ("hf-resnet", "s2a")]
)
def test_the_peak_is_predicted_for_every_batch(families, name, method):
    model = make(families[name], method)

    def simulate(batch: int):
        return simulate_step(model, families[name].images(batch))

    # batches that fill the pieces of the loops, and one that does not
    by_batch = PeakByBatch.fit(simulate, 2048, simulate(2048))
    for batch in (2048, 2800, 4000):
        assert by_batch.peak(batch) == pytest.approx(simulate(batch).peak, rel=0.03)
    assert simulate(8).peak <= by_batch.peak(8)
    budget = simulate(3000).peak
    largest = by_batch.largest_batch(budget)
    assert by_batch.peak(largest) <= budget < by_batch.peak(largest + 1)
    assert largest == pytest.approx(3000, rel=0.03)


def test_the_largest_line_changes():
    # few images: gradients; many: activations
    model = nn.Sequential(nn.Linear(1000, 1000), *(nn.GELU() for _ in range(9)), nn.Linear(1000, 1000))

    def simulate(batch: int):
        return simulate_step(model, torch.empty(batch, 1000))

    by_batch = PeakByBatch.fit(simulate, 4, simulate(4))
    for batch in (1, 4, 100, 5000):
        assert by_batch.peak(batch) == pytest.approx(simulate(batch).peak, rel=1e-3)
    per_image = [by_batch.peak(batch + 1) - by_batch.peak(batch) for batch in (3, 5000)]
    assert 2 * per_image[0] < per_image[1]


def test_batches_that_no_budget_or_every_budget_limits():
    def line(slope: float) -> PeakByBatch:
        return PeakByBatch(torch.tensor([100.0]), torch.tensor([slope]), ((4, 100 + int(4 * slope)),), 90)

    assert [line(10).largest_batch(budget) for budget in (99, 110, 155)] == [0, 1, 5]
    assert line(0).largest_batch(100) == UNLIMITED


def test_what_is_known_bounds_the_rest():
    by_batch = PeakByBatch(torch.tensor([1000.0]), torch.tensor([10.0]), ((4, 140),), 100)
    assert [by_batch.peak(batch) for batch in (1, 4, 8)] == [140, 140, 180]
    assert by_batch.peak(1000) == 10_100  # in proportion; by the line it would be 11,000
    assert by_batch.peak(10**6) == 10_000_100
    assert [by_batch.with_known(1, 105).peak(batch) for batch in (1, 2, 8, 20)] == [105, 110, 140, 200]


class Blocks(nn.Module):
    """Blocks of two layers, each of which keeps its output in full; an adapter makes them run in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)) for _ in range(3)
        )
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("policy", ["keep", "rebuild", "recompute"])
@pytest.mark.parametrize("items", [17, 32])
def test_blocks_in_pieces(policy, items):
    config = S2AConfig(
        activation_policy=policy,
        block_modules=r"blocks\.\d",
        modules_to_save=["head"],
        prompt_rank=0,
        side_reduction=0,
    )
    model = get_peft_model(Blocks(), config)
    x = torch.randn(items, 512, 64)
    assert x.numel() > CPU_PIECE
    simulated = simulate_step(model, x)
    assert simulated.step_peak == pytest.approx(peak_step_bytes(model, x), rel=0.04)
    assert simulated.kept == pytest.approx(kept_bytes_by_allocator(model, x), rel=0.02)
