"""Those who watch a run: console, files, TensorBoard, Weights & Biases, MLflow."""

from vitdense.engine.observers.base import Observer, Observers, Record, finite, format_number
from vitdense.engine.observers.choice import choose
from vitdense.engine.observers.console import LogLines, ProgressBar, describe
from vitdense.engine.observers.files import JsonLines, Tables, read_records
from vitdense.engine.observers.trackers import Background, Mlflow, TensorBoard, Wandb

__all__ = [
    "Background",
    "JsonLines",
    "LogLines",
    "Mlflow",
    "Observer",
    "Observers",
    "ProgressBar",
    "Record",
    "Tables",
    "TensorBoard",
    "Wandb",
    "choose",
    "describe",
    "finite",
    "format_number",
    "read_records",
]
