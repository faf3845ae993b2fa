"""Training: deterministic, resumable, and evaluated on what it has not seen."""

from mmkernels.train.config import Run as Run
from mmkernels.train.curve import draw as draw
from mmkernels.train.trainer import Diverged as Diverged
from mmkernels.train.trainer import Result as Result
from mmkernels.train.trainer import Trainer as Trainer
from mmkernels.train.trainer import train as train
