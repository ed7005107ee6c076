"""What a user sees of a federation: client curves, charts, the file of rounds, logs that go on, progress."""

from fl_lightning.local.recorder import ClientLogger, Record
from fl_lightning.reporting.charts import RoundCharts, add_client_histograms, client_layout, spread_metrics
from fl_lightning.reporting.client_curves import ClientCurves
from fl_lightning.reporting.client_names import LogClients, safe_name
from fl_lightning.reporting.continuation import cut_logs, flush_logs, truncate_events
from fl_lightning.reporting.device_charts import DeviceCharts
from fl_lightning.reporting.progress import (
    FederatedRichProgressBar,
    FederatedTQDMProgressBar,
    federated_progress_bar,
)
from fl_lightning.reporting.rounds_file import RoundsFile
from fl_lightning.reporting.versions import (
    continue_folder,
    continue_runs,
    continue_version,
    newest_checkpoint,
    newest_version,
)

__all__ = [
    "ClientCurves",
    "ClientLogger",
    "DeviceCharts",
    "FederatedRichProgressBar",
    "FederatedTQDMProgressBar",
    "LogClients",
    "Record",
    "RoundCharts",
    "RoundsFile",
    "add_client_histograms",
    "client_layout",
    "continue_folder",
    "continue_runs",
    "continue_version",
    "cut_logs",
    "federated_progress_bar",
    "flush_logs",
    "newest_checkpoint",
    "newest_version",
    "safe_name",
    "spread_metrics",
    "truncate_events",
]
