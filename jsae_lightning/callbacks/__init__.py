"""Callbacks: evaluation during training, pictures of the Jacobian, checkpoints, throughput and progress."""

from jsae_lightning.callbacks.checkpointing import Checkpointing
from jsae_lightning.callbacks.evaluation import InTrainingEvaluation
from jsae_lightning.callbacks.jacobian_histograms import JacobianHistograms
from jsae_lightning.callbacks.progress import TrainingProgress
from jsae_lightning.callbacks.throughput import Throughput

__all__ = ["Checkpointing", "InTrainingEvaluation", "JacobianHistograms", "Throughput", "TrainingProgress"]
