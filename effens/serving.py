r"""Serving: an ensemble as one file and one callable, which answers with the mean and the spread of its members.

.. math:: \bar p = \frac1M \sum_m p_m, \qquad \sigma^2 = \frac1M \sum_m (p_m - \bar p)^2

of the members' probabilities; of a regression's mixture, by the law of total variance,

.. math:: \bar\mu = \frac1M \sum_m \mu_m, \qquad
    \sigma^2 = \frac1M \sum_m \sigma_m^2 + \frac1M \sum_m (\mu_m - \bar\mu)^2.

What is written is what `Ensemble.answering` returns: MIMO with its first layer summed, of snapshots and SWAG only the
members, and networks that a `HyperEnsemble` repeats once, with their weights.

Two backends: AOTInductor compiles to machine code, for processors of the kind it is compiled on, and needs a C++
compiler to export; ONNX Runtime interprets a graph, anywhere.
"""

import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import StudentT as StudentTDistribution

from effens.ensembles.base import Ensemble, check_positive
from effens.inputs import Inputs, count_rows, rows_at
from effens.likelihoods import Categorical, Likelihood
from effens.storage import check_folder, write_whole
from effens.training import predict

FORMAT = "effens served 1"
BACKENDS = ("aoti", "onnx")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ["ensemble_mean", "ensemble_spread"]  # a graph has values of its own that are called mean
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class Served:
    """A file that `export` wrote, loaded: maps inputs of one shape to the members' mean and spread.

    It may be called from several threads at a time, with the number of threads inside that PyTorch had when it was
    exported (``"aoti"``) or loaded (``"onnx"``).

    Args:
        backend: ``"aoti"`` or ``"onnx"``.
        facts: what the file says of itself.
        run: what answers, unchecked, inputs that lie in memory one after the other.

    Attributes:
        backend: ``"aoti"`` or ``"onnx"``.
        shape: of the inputs, ``(batch, ...)``.
        dtype: of the inputs and the answers.
        device: of the inputs and the answers.
        members: how many members answered; a `HyperEnsemble`'s repeats are counted.
        likelihood: what the outputs mean, in words.
        run: x -> (mean, spread) without any check: a tensor of another shape or layout gets numbers from anywhere.
    """

    def __init__(self, backend: str, facts: dict[str, Any], run: Run) -> None:
        self.backend = backend
        self.shape = torch.Size(facts["shape"])
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.device = torch.empty(0, device=facts["device"]).device  # "cuda" becomes "cuda:0", as tensors have it
        self.members: int = facts["members"]
        self.likelihood: str = facts["likelihood"]
        self.run = run

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the spread: ``(batch, classes)`` each of probabilities, ``(batch,)`` in a regression.

        Raises:
            ValueError: ``x`` has another shape, dtype or device than the file was made for.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}")
        if (x.shape, x.dtype, x.device) != (self.shape, self.dtype, self.device):
            wanted = f"shape {tuple(self.shape)}, {self.dtype}, on {self.device}"
            raise ValueError(
                f"x must be as it was exported, {wanted}, got shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )
        return self.run(x.contiguous())

    def __repr__(self) -> str:
        """Show what it answers."""
        return f"Served({self.backend!r}, {tuple(self.shape)}, members={self.members}, {self.likelihood})"


@torch.no_grad()
def export(
    ensemble: Ensemble,
    x: Tensor,
    path: str | os.PathLike[str],
    backend: str = "aoti",
    *,
    likelihood: Likelihood | None = None,
) -> Served:
    """Write an ensemble to one file that answers, with mean and spread, without the ensemble; and return it loaded.

    The answers equal those of `effens.predict` to rounding, which is checked on ``x``.

    Args:
        ensemble: any ensemble, trained; it is left as it is.
        x: inputs ``(batch, ...)`` like those to come: their shape, dtype and number of rows are fixed.
        path: where to; by custom ``*.pt2`` or ``*.onnx``. It is written whole or not at all, and nothing beside it.
        backend: ``"aoti"``: AOTInductor, for the ensemble's device. Compiling takes from some seconds to a minute, and
            needs a C++ compiler; loading does not. **The file holds machine code: load only files you trust.**
            ``"onnx"``: ONNX Runtime, on the CPU; needs onnx, onnxscript and onnxruntime.
        likelihood: what the outputs mean; `Categorical` by default. One whose ``predict`` returns a tensor gets that
            tensor's mean and standard deviation over members: with ``predict`` returning ``outputs[..., 0]``, say, how
            far the members' means disagree.

    Returns:
        A callable: ``x`` to ``(mean, spread)``. With `Categorical` the members' mean probabilities and their standard
        deviation, ``(batch, classes)`` each; with `Gaussian` and `StudentT` the mixture's mean and its standard
        deviation, ``(batch,)`` each, as of `effens.mixture`. Members are the whole of the mixture and not a sample of
        it: the variance over them is divided by M, and 0 for one member.

    Raises:
        ValueError: ``backend`` is unknown, ``x`` holds no rows or numbers that are not finite, or members are drawn
            anew at each call.
        FileNotFoundError: the folder of ``path`` does not exist.
        RuntimeError: there are no members yet; no C++ compiler is found (``"aoti"``); or the file does not answer what
            the ensemble does.
        ModuleNotFoundError: a package is missing (``"onnx"``).

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> served = effens.export(ensemble, torch.randn(1, 3), "ensemble.pt2")  # doctest: +SKIP
        >>> mean, spread = served(torch.randn(1, 3))  # doctest: +SKIP
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'aoti' or 'onnx', got {backend!r}")
    check_backend(backend)
    check_folder("path", Path(path))
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be one tensor, which make_net may take apart, got {type(x).__name__}")
    if x.dim() < 2 or not len(x):
        raise ValueError(f"x must be (batch, ...) with at least one row, got shape {tuple(x.shape)}")
    if unknown := int((~x.isfinite()).sum()):
        raise ValueError(f"x must be finite, as answers are checked on it, got {unknown} numbers that are not")
    likelihood = Categorical() if likelihood is None else likelihood
    network = Summary(ensemble, likelihood).eval().requires_grad_(False)
    expected = moments(predict(ensemble, x, likelihood=likelihood, chunk=len(x)), None)  # says what is wrong, if it is
    network = network.cpu() if backend == "onnx" else network
    home = next((tensor.device for tensor in network.state_dict().values()), x.device)
    x = x.detach().to(home).contiguous()
    facts = {
        "format": FORMAT,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": home.type,
        "members": ensemble.members,
        "likelihood": repr(likelihood),
    }
    with without_warnings(), without_validation():
        content = compile_package(network, x, facts) if backend == "aoti" else onnx_model(network, x, facts)
    served = load_content(content, Path(path).name)
    check_equal(served(x), expected)
    write_whole(Path(path), content)
    return served


def load_served(path: str | os.PathLike[str]) -> Served:
    """Load a file that `export` wrote. One of AOTInductor's holds machine code: **load only files you trust**.

    Args:
        path: what `export` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut, or was not written by `export`.
        ModuleNotFoundError: it is for ONNX Runtime, which is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that effens.export wrote, got {path.name}, which is no file")
    return load_content(path.read_bytes(), path.name)


def summarize(
    ensemble: Ensemble, x: Inputs, *, likelihood: Likelihood | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return the members' mean and spread, as `export`'s file does, in chunks of rows.

    `effens.predict` keeps every member's answer to every row; this keeps them for one chunk at a time, so that all it
    needs beyond ``x`` and the result does not grow with the rows.

    Args:
        ensemble: any ensemble; it is asked on its own device, and left in the mode it was in.
        x: inputs ``(batch, ...)``.
        likelihood: what the outputs mean; `Categorical` by default.
        chunk: rows in a chunk.

    Returns:
        ``(mean, spread)``, on the device of ``x``: see `export`.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> mean, spread = summarize(ensemble, torch.randn(10, 3))
        >>> mean.shape, spread.shape
        (torch.Size([10, 2]), torch.Size([10, 2]))
    """
    check_positive(chunk=chunk)
    chunks = (rows_at(x, slice(start, start + chunk)) for start in range(0, max(count_rows(x), 1), chunk))
    wholes: list[Tensor] = []
    for i, rows in enumerate(chunks):
        found = moments(predict(ensemble, rows, likelihood=likelihood, chunk=chunk), None)
        wholes = wholes or [values.new_empty(count_rows(x), *values.shape[1:]) for values in found]
        for whole, values in zip(wholes, found, strict=True):
            whole[i * chunk : (i + 1) * chunk] = values
    return wholes[0], wholes[1]


class Summary(nn.Module):
    """What is exported: the members' mean and spread, of a copy of what is needed to answer.

    Args:
        ensemble: any ensemble.
        likelihood: what its outputs mean.
    """

    weights: Tensor | None

    def __init__(self, ensemble: Ensemble, likelihood: Likelihood) -> None:
        super().__init__()
        answering, weights = ensemble.answering()
        self.ensemble = copy.deepcopy(answering)
        self.likelihood = likelihood
        even = len(set(weights)) == 1
        dtype = next((p.dtype for p in self.ensemble.parameters() if p.is_floating_point()), torch.float32)
        self.register_buffer("weights", None if even else torch.tensor(weights, dtype=dtype) / sum(weights))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(batch, ...)`` to the mean and the spread."""
        return moments(self.likelihood.predict(self.ensemble(x)), self.weights)


def moments(prediction: Tensor | Distribution, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of members ``(members, batch, ...)``, weighted or equal."""

    def average(values: Tensor) -> Tensor:
        if weights is None:
            return values.mean(0)
        total: Tensor = torch.tensordot(weights.to(values), values, dims=1)
        return total

    if isinstance(prediction, Tensor):
        means, variance = prediction, torch.zeros_like(prediction)
    elif isinstance(prediction, StudentTDistribution):  # its own variance picks elements, which no compiler likes
        means, df = prediction.loc, prediction.df
        variance = torch.where(df > 2, prediction.scale.square() * df / (df - 2), torch.inf)
    else:
        means, variance = prediction.mean, prediction.variance
    mean = average(means)
    return mean, average(variance + (means - mean).square()).sqrt()


def check_backend(backend: str) -> None:
    """Raise unless the backend has what it needs to export."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if backend == "onnx" and missing:
        rule = f"backend 'onnx' needs the packages {', '.join(PACKAGES)}"
        raise ModuleNotFoundError(f"{rule}, missing {', '.join(missing)}: pip install {' '.join(missing)}")


def compile_package(network: Summary, x: Tensor, facts: dict[str, Any]) -> bytes:
    """Return the content of an AOTInductor package."""
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(network, (x,))
    options: dict[str, Any] = {"aot_inductor.metadata": {"effens": json.dumps(facts)}}
    if x.device.type == "cpu":
        aten = torch.ops.aten
        program = program.run_decompositions({aten.linear.default: linear, aten.baddbmm.default: baddbmm})
    package = io.BytesIO()
    aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    return package.getvalue()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `torch.nn.functional.linear` does with `product`."""
    y = product(x.reshape(1, -1, x.shape[-1]), weight.mT[None]).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def baddbmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Do what `torch.baddbmm` does with `product`, the bias apart, where it is fused with what follows."""
    return product(x, weight) * alpha + bias * beta


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``(members, rows, in)`` and ``(members, in, out)`` in the way that was measured fastest on a CPU.

    One row by sums, which the compiler writes itself; more by `torch.bmm`, also where a plain product would do.
    """
    if x.shape[1] == 1:
        return (x * weight.mT).sum(-1)[:, None]
    return torch.bmm(x, weight)


def onnx_model(network: nn.Module, x: Tensor, facts: dict[str, Any]) -> bytes:
    """Return the content of an ONNX file."""
    import onnx

    program = torch.onnx.export(
        network, (x,), dynamo=True, external_data=False, verbose=False, input_names=["x"], output_names=OUTPUTS
    )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # lines of this machine's source files
    onnx.helper.set_model_props(proto, {"effens": json.dumps(facts)})
    content: bytes = proto.SerializeToString()
    return content


def load_content(content: bytes, name: str) -> Served:
    """Load the content of a file of either backend."""
    backend = "aoti" if content.startswith(b"PK") else "onnx"
    try:
        with without_warnings():
            answer, facts = (package_run if backend == "aoti" else session_run)(content)
        served = Served(backend, facts, answer)
        if facts["format"] != FORMAT:
            raise ValueError(facts["format"])
    except ModuleNotFoundError:
        raise
    except Exception as error:
        rule = f"{name} must be a whole file that effens.export wrote"
        raise ValueError(f"{rule}, got one that cannot be loaded: {error}") from error
    return served


def package_run(content: bytes) -> tuple[Run, dict[str, Any]]:
    """Return what runs an AOTInductor package, and its facts."""
    from torch._inductor import aoti_load_package

    loader = aoti_load_package(io.BytesIO(content)).loader
    run = loader.run

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = run([x])
        return mean, spread

    return answer, json.loads(loader.get_metadata()["effens"])


def session_run(content: bytes) -> tuple[Run, dict[str, Any]]:
    """Return what runs an ONNX file, and its facts."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ModuleNotFoundError("a file for ONNX Runtime needs the package onnxruntime: pip install onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    run = session.run

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = run(OUTPUTS, {"x": x.detach().numpy()})
        return torch.from_numpy(mean), torch.from_numpy(spread)

    return answer, json.loads(session.get_modelmeta().custom_metadata_map["effens"])


def check_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Raise `RuntimeError` unless mean and spread are what the ensemble says, to half of the digits."""
    scale = float(expected[0].abs().max()) + float(expected[1].abs().max())
    for name, mine, its in zip(("mean", "spread"), got, expected, strict=True):
        allowed = scale * torch.finfo(its.dtype).eps ** 0.5
        if mine.shape != its.shape or not torch.allclose(mine.to(its), its, rtol=0, atol=allowed, equal_nan=True):
            raise RuntimeError(f"the exported {name} must equal the ensemble's, got {mine} instead of {its}")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back what compilers warn of that a reader can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._inductor", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_validation() -> Iterator[None]:
    """Let distributions take parameters unseen: while a graph is traced they have no values."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
