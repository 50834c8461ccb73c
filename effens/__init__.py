"""Efficient ensembles: uncertainty from many networks for less than many networks' cost."""

from effens.cascade import cascade, cascade_threshold
from effens.costs import Costs, measure
from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble, BatchEnsembleConv2d, BatchEnsembleLinear
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble, greedy_select
from effens.ensembles.lora import LoRAEnsemble, add_lora
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble, cyclic_cosine
from effens.ensembles.swag import SWAG
from effens.ensembles.tabm import TabM
from effens.likelihoods import Categorical, Gaussian, Likelihood, StudentT, mixture
from effens.scaling import fit_each
from effens.scores import (
    accuracy,
    auroc,
    brier,
    crps,
    disagreement,
    diversity_gain,
    ece,
    expected_entropy,
    member_nll,
    mutual_information,
    nll,
    temper,
    temperature,
    total_entropy,
)
from effens.serving import export, summarize
from effens.storage import load, save
from effens.training import History, device, fit, predict
from effens.tuning import Candidates, search, stratify

__version__ = "0.1.0"

__all__ = ["MIMO", "SWAG", "BatchEnsemble", "DeepEnsemble", "Ensemble", "HyperEnsemble"]
__all__ += ["LoRAEnsemble", "SnapshotEnsemble", "TabM", "add_lora", "cascade", "cascade_threshold"]
__all__ += ["BatchEnsembleConv2d", "BatchEnsembleLinear", "cyclic_cosine"]
__all__ += ["Costs", "History", "device", "export", "fit", "load", "measure", "predict", "save", "summarize"]
__all__ += ["Categorical", "Gaussian", "Likelihood", "StudentT", "mixture"]
__all__ += ["accuracy", "auroc", "brier", "crps", "disagreement", "diversity_gain", "ece", "expected_entropy"]
__all__ += ["member_nll", "mutual_information", "nll", "temper", "temperature", "total_entropy"]
__all__ += ["Candidates", "fit_each", "greedy_select", "search", "stratify"]
