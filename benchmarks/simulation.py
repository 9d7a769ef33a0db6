"""Peak of live bytes of a program without running it: fake tensors, and a mode that follows every storage.

Storages are counted from the operator that makes them until they are freed, by the bytes asked for. What kernels
allocate inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all results of operators.

    Attributes:
        live: bytes live now.
        peak: the most bytes that were live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result

    def add(self, values: list[Any]) -> None:
        """Counts the storages of the tensors among `values` that are not counted yet."""
        for tensor in values:
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue

            def freed(_: Any, key: int = key, size: int = size) -> None:
                self._known.pop(key, None)
                self.live -= size

            self._known[key] = weakref.ref(storage, freed)
            self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def simulated(model: nn.Module) -> Iterator[LiveBytes]:
    """Inside, tensors have shapes but no content, those of `model` too (for good); gives a counter that knows them."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode, LiveBytes() as counter:
        fake_mode.cache_enabled = False  # its keys hold the storages that `Tensor.set_` was given
        replaced: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in replaced:
                replaced[id(tensor)] = fake_mode.from_tensor(tensor, static_shapes=True)
            return replaced[id(tensor)]

        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)  # type: ignore[assignment]
        counter.add(list(replaced.values()))
        yield counter


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
