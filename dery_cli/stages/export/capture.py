"""A network as the graph that the formats are written from, its batch norms folded on request."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dery_cli.errors import DeryError

BATCH = "batch"
"""What the dynamic axis is called."""
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


def capture(network: nn.Module, images_NCHW: Tensor, most: int | None = None) -> ExportedProgram:
    """The graph of a network, for batches of any size.

    Args:
        network: On the CPU, in eval mode.
        images_NCHW: At least two normalised images.
        most: Largest batch; None for no limit.

    Raises:
        DeryError: It cannot be traced, or only for one batch size.
    """
    with torch.no_grad(), converting("torch.export"):
        batch = Dim(BATCH, min=1) if most is None else Dim(BATCH, min=1, max=most)
        program = torch.export.export(
            network, (images_NCHW,), dynamic_shapes=({0: batch},), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


@contextlib.contextmanager
def converting(what: str) -> Iterator[None]:
    """A block in which a library converts: it prints nothing, and what it raises is told in a line.

    Raises:
        DeryError: It failed; the operators that the library names are named.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    except (DeryError, OSError, MemoryError):
        raise
    except Exception as error:
        raise DeryError(
            f"{what} cannot take the network: {_reason(error)}",
            "try another --format; nothing was written",
        ) from error
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The operators that an error and its causes name, or else its first line."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    named = sorted(set(re.findall(r"OpOverload\(op='([\w.:]+)'", " ".join(texts))))
    if named:
        return f"it has no operator for {', '.join(named)}"
    first = next((line.strip() for line in texts[0].splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"


def fold_batch_norms(
    program: ExportedProgram, images_NCHW: Tensor, most: int | None = None
) -> tuple[ExportedProgram, int]:
    """The same with every batch norm that alone reads a convolution folded into its weights.

    Torch's own ``fuse_conv_bn_weights``, on the graph, so that it does not matter as what kind of
    module a donor writes its batch norm.

    Returns:
        The graph, and how many were folded.

    Raises:
        DeryError: As ``capture``.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    folded = 0
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.batch_norm.default and _fold(module, node, folded):
            folded += 1
    if not folded:
        return program, 0
    module.graph.eliminate_dead_code()
    _forget_unread(module)
    module.recompile()
    return capture(module, images_NCHW, most), folded


def _fold(module: fx.GraphModule, norm: fx.Node, number: int) -> bool:
    """Fold one batch norm; False where what comes before it is no convolution of its own."""
    conv, weight, bias, mean, variance, training, _, eps = norm.args[:8]
    if not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) > 1:
        return False
    conv_bias = conv.args[2] if len(conv.args) > 2 else None
    tensors = [_tensor(module, arg) for arg in (conv.args[1], mean, variance)]
    if training or any(tensor is None for tensor in tensors):
        return False
    w_DCHW, mean_D, variance_D = (tensor for tensor in tensors if tensor is not None)
    assert isinstance(eps, float)
    fused = fuse_conv_bn_weights(
        w_DCHW,
        _tensor(module, conv_bias),
        mean_D,
        variance_D,
        eps,
        _tensor(module, weight),
        _tensor(module, bias),
    )
    names = (f"folded_{number}_weight", f"folded_{number}_bias")
    with module.graph.inserting_before(conv):
        for position, (name, parameter) in enumerate(zip(names, fused, strict=True), start=1):
            module.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
            read = module.graph.get_attr(name)
            if position < len(conv.args):
                conv.update_arg(position, read)
            else:
                conv.args = (*conv.args, read)
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)
    return True


def _forget_unread(module: fx.GraphModule) -> None:
    """Remove parameters and buffers that the graph reads no more; they would be written too."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    owned = [*module.named_parameters(), *module.named_buffers()]
    for name in [name for name, _ in owned if name not in read]:
        path, _, last = name.rpartition(".")
        delattr(module.get_submodule(path), last)


def _tensor(module: fx.GraphModule, arg: object) -> Tensor | None:
    """The parameter or buffer that an argument reads; None where there is none."""
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return None
    found: object = module
    for name in str(arg.target).split("."):
        found = getattr(found, name)
    assert isinstance(found, Tensor)
    return found.detach()
