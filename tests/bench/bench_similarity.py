"""CKA of a whole zoo at once against the loop over pairs, torch_cka, and the machine's peak.

    python tests/bench/bench_similarity.py                 # about two minutes on two idle cores
    python tests/bench/bench_similarity.py --parts paper
    OMP_NUM_THREADS=1 python tests/bench/bench_similarity.py --cpu-time   # on a busy machine

``torch_cka`` is compared where it is installed (pip install --no-deps torch_cka).

Features are synthetic: a low-rank part that nodes share, plus noise, in float16, with the channel
counts of 24 well-known models. Loops are timed on a sample of pairs and extrapolated to all pairs;
lines that hold an extrapolated figure say so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dery_cli.core.similarity.cka import LinearGrams
from dery_cli.core.similarity.compare import CKA, Known, MetricOptions, similarity
from dery_cli.core.similarity.gram import plan_chunks

clock = time.perf_counter

MODELS = {
    "resnet18": [64] * 2 + [128] * 2 + [256] * 2 + [512] * 3,
    "resnet34": [64] * 3 + [128] * 4 + [256] * 6 + [512] * 4,
    "resnet50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "resnet101": [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 4,
    "resnext50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "wide_resnet50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "mobilenet_v3": [16] + [24] * 2 + [40] * 3 + [80] * 4 + [112] * 2 + [160] * 3 + [960],
    "efficientnet_b0": [16] + [24] * 2 + [40] * 2 + [80] * 3 + [112] * 3 + [192] * 4 + [320, 1280],
    "regnety_800m": [64] + [144] * 3 + [320] * 8 + [784] * 3,
    "regnety_1.6g": [48] * 2 + [120] * 6 + [336] * 17 + [888] * 3,
    "regnety_8g": [224] * 2 + [448] * 4 + [896] * 10 + [2016] * 2,
    "densenet121": [256, 512, 1024, 1024],
    "convnext_tiny": [96] * 3 + [192] * 3 + [384] * 9 + [768] * 4,
    "convnext_small": [96] * 3 + [192] * 3 + [384] * 27 + [768] * 4,
    "vit_tiny": [192] * 13,
    "vit_small": [384] * 13,
    "vit_base": [768] * 13,
    "deit_small": [384] * 13,
    "swin_tiny": [96] * 2 + [192] * 2 + [384] * 6 + [768] * 3,
    "swin_small": [96] * 2 + [192] * 2 + [384] * 18 + [768] * 3,
    "swin_base": [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 3,
    "mixer_small": [512] * 9,
    "resnet50_inat": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "resnet50_swav": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
}


def synthetic(channels: int, samples: int, generator: torch.Generator, shared: Tensor) -> Tensor:
    """Features [samples, channels] in float16: a third shared low rank, the rest their own."""
    mix = torch.randn(shared.shape[1], channels, generator=generator)
    own = torch.randn(samples, channels, generator=generator)
    return (shared @ mix * 0.3 + own + 2.0).half()


def peak_rate(size: int = 3072, repeats: int = 3) -> float:
    """The machine's multiply-adds a second on a large float32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    return size**3 / min(timed(lambda: a @ b)[0] for _ in range(repeats))


def resident(peak: bool = False) -> float:
    """Resident memory of this process in GB, now or at its peak since ``reset_peak``."""
    word = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(word))
    return int(line.split()[1]) * 1024 / 1e9


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = run()
    return clock() - start, result


def hsic_textbook(k: Tensor, other: Tensor) -> Tensor:
    """HSIC_1 as the papers print it and research code writes it: with the product K L."""
    m = k.shape[0]
    product = k @ other
    return (
        torch.trace(product)
        + k.sum() * other.sum() / ((m - 1) * (m - 2))
        - 2 * product.sum() / (m - 2)
    )


def hsic_careful(k: Tensor, other: Tensor) -> Tensor:
    """The same without the product."""
    m = k.shape[0]
    return (
        (k * other).sum()
        + k.sum() * other.sum() / ((m - 1) * (m - 2))
        - 2 * (k.sum(0) @ other.sum(0)) / (m - 2)
    )


def pair_loop(
    x: Tensor, y: Tensor, minibatch: int, hsic: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """CKA of one pair of nodes as a loop over pairs computes it: two Grams, three HSICs."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(x), minibatch):
        grams = []
        for feat in (x, y):
            feat = feat[start : start + minibatch].float()
            feat = feat - feat.mean(0)
            grams.append((feat @ feat.T).fill_diagonal_(0))
        k, other = grams
        total += torch.stack([hsic(k, other), hsic(k, k), hsic(other, other)]).double()
    return float(total[0] / (total[1] * total[2]).sqrt())


def needed(channels: list[int], samples: int, minibatch: int) -> float:
    """Multiply-adds that the algorithm needs: half Grams, and half of all pairs over half Grams."""
    batches = samples / minibatch
    half = minibatch * (minibatch + 1) / 2
    return batches * half * (sum(channels) + len(channels) * (len(channels) + 1) / 2)


def gram_seconds(features: list[Tensor], minibatch: int) -> float:
    """Time to build the packed Grams of all nodes once, without any product of nodes."""
    grams = LinearGrams(features, MetricOptions(minibatch=minibatch))
    chunk = plan_chunks(minibatch, 10**9)[0]
    out_K = torch.empty(chunk.area)

    def build() -> None:
        for start in range(0, len(features[0]), minibatch):
            for node in range(len(features)):
                grams.write(out_K, node, start, start + minibatch, chunk)

    return timed(build)[0]


def paper_zoo(samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(samples, 32, generator=generator)
    channels = [c for widths in MODELS.values() for c in widths]
    return [synthetic(c, samples, generator, shared) for c in channels]


def paper(samples: int = 2048) -> None:
    """The paper-size zoo, at both minibatches, against the loop over pairs; adding one model."""
    features = paper_zoo(samples)
    channels = [f.shape[1] for f in features]
    nodes, pairs = len(features), len(features) * (len(features) + 1) // 2
    print(
        f"paper-size zoo: {len(MODELS)} models, {nodes} nodes, {samples} samples, "
        f"{sum(channels) / nodes:.0f} channels on average, {torch.get_num_threads()} threads"
    )
    print(
        f"{'minibatch':>9} {'all pairs':>9} {'(Grams)':>9} {'of peak':>8} {'memory':>8} "
        f"{'textbook loop*':>14} {'ratio':>8} {'careful loop*':>14} {'ratio':>8} {'max diff':>9}"
    )
    for minibatch, drawn in ((256, 24), (2048, 6)):
        options = MetricOptions(minibatch=minibatch)
        rate = peak_rate()
        before = resident()
        reset_peak()
        seconds, result = timed(lambda o=options: similarity(features, CKA, o))
        memory = resident(peak=True) - before
        rate = max(rate, peak_rate())
        generator = torch.Generator().manual_seed(1)
        sample = torch.randint(nodes, (drawn, 2), generator=generator).tolist()
        loops, diff = [], 0.0
        for hsic in (hsic_textbook, hsic_careful):
            spent = 0.0
            for i, j in sample:
                took, value = timed(
                    lambda i=i, j=j, h=hsic, m=minibatch: pair_loop(features[i], features[j], m, h)
                )
                spent += took
                diff = max(diff, abs(value - float(result.sim_PP[i, j])))
            loops.append(spent / drawn * pairs)
        print(
            f"{minibatch:>9} {seconds:>8.1f}s {gram_seconds(features, minibatch):>8.1f}s "
            f"{needed(channels, samples, minibatch) / seconds / rate:>8.2f} {memory:>6.1f}GB "
            f"{loops[0] / 3600:>13.1f}h {loops[0] / seconds:>7.0f}x "
            f"{loops[1] / 3600:>13.1f}h {loops[1] / seconds:>7.0f}x {diff:>9.1e}"
        )
    print(
        f"* extrapolated to {pairs:,} pairs from random ones: 24 at 256, 6 at 2048. Textbook: "
        "with the product K L, as papers print it and research code has it; careful: without"
    )
    print(f"matrix-product peak of this machine: {rate / 1e9:.0f} G multiply-adds a second")

    options = MetricOptions(minibatch=256)
    last = len(list(MODELS.values())[-1])
    seconds, whole = timed(lambda: similarity(features, CKA, options))
    old = similarity(features[:-last], CKA, options)
    known = Known(similarity=old, positions=[*range(nodes - last), *[None] * last])
    added, grown = timed(lambda: similarity(features, CKA, options, known=known))
    grams = gram_seconds(features, 256)
    print(
        f"adding the last model ({last} nodes), minibatch 256: {added:.2f}s, of which "
        f"{grams:.2f}s rebuild Grams; everything: {seconds:.2f}s; "
        f"max diff {float((grown.sim_PP - whole.sim_PP).abs().max()):.0e}"
    )
    kept = Known(similarity=whole, positions=list(range(nodes - last)))
    removed, _ = timed(lambda: similarity(features[:-last], CKA, options, known=kept))
    print(f"removing it: {removed * 1e3:.0f} ms")


def scale() -> None:
    """Growth with nodes, and 20,000 nodes in bounded memory."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(256, 32, generator=generator)
    widths = (64, 128, 256, 384, 512, 768, 1024)
    pool = [synthetic(c, 256, generator, shared) for c in widths for _ in range(10)]
    print("scale: one minibatch of 256, channels 64 to 1,024, 20 nodes a model")
    print(f"{'models':>7} {'nodes':>7} {'time':>8} {'(Grams)':>8} {'pairs, G multiply-adds/s':>25}")
    grams = gram_seconds(pool, 256) / len(pool)
    each = 0.0
    for nodes in (1000, 2000, 4000):
        features = [pool[p % len(pool)] for p in range(nodes)]
        seconds, _ = timed(lambda f=features: similarity(f))
        each = (seconds - grams * nodes) / (nodes * (nodes + 1) / 2)
        print(
            f"{nodes // 20:>7} {nodes:>7} {seconds:>7.1f}s {grams * nodes:>7.1f}s "
            f"{256 * 257 / 2 / each / 1e9:>25.0f}"
        )
    per_batch = grams * 20_000 + each * 20_000 * 20_001 / 2
    print(
        f"   1000   20000 {per_batch:>7.0f}s {grams * 20_000:>7.0f}s   extrapolated; 8 minibatches "
        f"(2,048 samples): {per_batch * 8 / 60:.0f} min"
    )
    print(
        f"cost: samples x ({grams / 256 * 1e6:.2f} us x nodes + {each / 256 * 1e9:.2f} ns x pairs);"
        " with models as with nodes"
    )
    features = [pool[p % len(pool)][:32, :64] for p in range(20_000)]
    before = resident()
    reset_peak()
    seconds, _ = timed(lambda: similarity(features, CKA, MetricOptions(minibatch=32)))
    print(
        f"measured whole: 20,000 nodes, one minibatch of 32: {seconds:.0f}s, "
        f"{resident(peak=True) - before:.1f} GB of the 4 GB bound"
    )


def against_torch_cka() -> None:
    """Two ResNets through torch_cka and through ``similarity``, on the same raw features."""
    try:
        for name in ("matplotlib", "matplotlib.pyplot", "mpl_toolkits", "mpl_toolkits.axes_grid1"):
            sys.modules.setdefault(name, types.ModuleType(name))  # it imports these for its plots
        sys.modules["matplotlib"].pyplot = sys.modules["matplotlib.pyplot"]
        sys.modules["mpl_toolkits"].axes_grid1 = sys.modules["mpl_toolkits.axes_grid1"]
        import torch_cka
    except ImportError:
        print("torch_cka: not installed, skipped (pip install --no-deps torch_cka)")
        return
    import timm

    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=0).eval() for name in ("resnet10t", "resnet18")]
    layers = [
        [name for name, module in model.named_modules() if type(module).__name__ == "BasicBlock"]
        for model in models
    ]
    x = torch.randn(512, 3, 32, 32) + torch.randn(512, 3, 1, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=256)
    quiet = (warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad())
    with quiet[0], quiet[1], quiet[2]:
        warnings.simplefilter("ignore")
        other = torch_cka.CKA(
            *models, "a", "b", model1_layers=layers[0], model2_layers=layers[1], device="cpu"
        )
        theirs, _ = timed(lambda: other.compare(loader))
    with torch.no_grad():
        ours, sim_PP = timed(lambda: raw_similarity(models, layers, x))
    first = len(layers[0])
    diff = (sim_PP[:first, first:] - other.export()["CKA"]).abs().max()
    print(
        f"torch_cka: {first} x {len(layers[1])} blocks of two ResNets, 512 samples, minibatch 256, "
        f"forward included: {theirs:.1f}s, here (all {len(sim_PP)} blocks with all) {ours:.1f}s, "
        f"{theirs / ours:.1f}x; max difference {diff:.1e}"
    )


def raw_similarity(models: list[nn.Module], layers: list[list[str]], x: Tensor) -> Tensor:
    """CKA of unpooled features, which is what torch_cka compares."""
    kept: dict[tuple[int, str], list[Tensor]] = {}
    for index, (model, names) in enumerate(zip(models, layers, strict=True)):
        modules = dict(model.named_modules())
        handles = []
        for name in names:
            rows = kept.setdefault((index, name), [])
            handles.append(
                modules[name].register_forward_hook(
                    lambda _m, _i, out, rows=rows: rows.append(out.flatten(1))
                )
            )
        for part in x.split(256):
            model(part)
        for handle in handles:
            handle.remove()
    return similarity([torch.cat(rows) for rows in kept.values()]).sim_PP


PARTS = {"paper": paper, "scale": scale, "torch_cka": against_torch_cka}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's time; with one thread only"
    )
    chosen = parser.parse_args()
    if chosen.cpu_time:
        clock = time.process_time
        torch.set_num_threads(1)
    for part in chosen.parts:
        PARTS[part]()
        print()
