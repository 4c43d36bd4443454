//! The names of everything that is measured: ours, and PGHoard's beside them. Pure.

use super::metrics::{Kind, Metric};

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, help }
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, help }
}

pub const BUILD_INFO: Metric = gauge("pgkeep_build_info", "Always 1; the version is a label.");
pub const START_TIME: Metric = gauge("pgkeep_start_time_seconds", "When the agent started, in Unix time.");
pub const CONFIG_RELOADS: Metric =
    counter("pgkeep_config_reloads_total", "Configurations read again, by result.");

pub const ARCHIVING_UP: Metric =
    gauge("pgkeep_archiving_up", "1 while WAL is streamed from a server, 0 while it should be and is not.");
pub const WAL_RECEIVED: Metric =
    gauge("pgkeep_wal_received_lsn_bytes", "WAL position up to which everything is received.");
pub const WAL_STORED: Metric =
    gauge("pgkeep_wal_stored_lsn_bytes", "WAL position up to which everything is in storage.");
pub const WAL_SERVER: Metric =
    gauge("pgkeep_wal_server_lsn_bytes", "WAL position of the server when it last spoke.");
pub const WAL_LAG: Metric =
    gauge("pgkeep_wal_lag_bytes", "Bytes of WAL that the server has and storage has not.");
pub const WAL_OLDEST_UNSTORED: Metric = gauge(
    "pgkeep_wal_oldest_unstored_seconds",
    "Age of the oldest WAL that may be lost with the server: how far back a recovery would fall now.",
);
pub const WAL_GAPS: Metric = counter("pgkeep_wal_gaps_total", "Gaps found in the archive since the start.");
pub const WAL_SINCE_BACKUP: Metric =
    gauge("pgkeep_wal_segments_since_backup", "WAL segments stored since the last base backup.");

pub const BACKUPS: Metric = counter("pgkeep_backups_total", "Base backups taken, by result.");
pub const BACKUP_RUNNING: Metric = gauge("pgkeep_backup_running", "1 while a base backup is being taken.");
pub const BACKUP_PROGRESS: Metric =
    gauge("pgkeep_backup_progress_ratio", "Share of the running base backup that is read, 0 to 1.");
pub const BACKUP_STALLED: Metric =
    gauge("pgkeep_backup_stalled_seconds", "Time since the running base backup last read anything.");
pub const BACKUP_DURATION: Metric =
    gauge("pgkeep_backup_last_duration_seconds", "How long the last base backup took.");
pub const BACKUP_BYTES: Metric =
    gauge("pgkeep_backup_last_stored_bytes", "Bytes that the last base backup takes in storage.");
pub const BACKUP_PLAIN_BYTES: Metric =
    gauge("pgkeep_backup_last_plaintext_bytes", "Bytes that the last base backup holds.");
pub const BACKUP_TIME: Metric =
    gauge("pgkeep_backup_last_start_timestamp_seconds", "When the newest base backup began, in Unix time.");
pub const BACKUP_COUNT: Metric = gauge("pgkeep_backups_stored", "Base backups in storage.");
pub const PRUNED: Metric = counter("pgkeep_pruned_backups_total", "Base backups removed by retention.");

pub const STORED_OBJECTS: Metric = counter("pgkeep_stored_objects_total", "Objects put into storage.");
pub const STORED_BYTES: Metric = counter("pgkeep_stored_bytes_total", "Bytes put into storage, as stored.");
pub const STORED_PLAIN_BYTES: Metric =
    counter("pgkeep_stored_plaintext_bytes_total", "The same before compression, where that is known.");
pub const READ_BYTES: Metric = counter("pgkeep_read_bytes_total", "Bytes read from storage, as stored.");
pub const LAST_STORED: Metric =
    gauge("pgkeep_last_stored_timestamp_seconds", "When an object was last stored, in Unix time.");
pub const REQUESTS: Metric = counter("pgkeep_storage_requests_total", "Requests to storage, by result.");
pub const REQUEST_SECONDS: Metric =
    counter("pgkeep_storage_request_seconds_total", "Time that requests to storage took.");
pub const ERRORS: Metric = counter("pgkeep_errors_total", "Things that went wrong, by where they did.");
pub const LEFTOVERS: Metric =
    counter("pgkeep_leftovers_total", "Files left behind by PGHoard that were looked at, by result.");

pub const PGHOARD_EXCEPTION: Metric = counter("pghoard.exception", "Things that went wrong.");
pub const PGHOARD_REQUESTED: Metric =
    gauge("pghoard.backup_stream.basebackup_requested", "A base backup was begun.");
pub const PGHOARD_COMPLETED: Metric = counter("pghoard.basebackup_completed", "Base backups taken.");
pub const PGHOARD_FAILED: Metric = counter("pghoard.basebackup_failed", "Base backups that failed.");
pub const PGHOARD_BACKUP_TIME: Metric = gauge("pghoard.backup_time", "Seconds the last base backup took.");
pub const PGHOARD_BACKUP_BYTES: Metric =
    counter("pghoard.basebackup_bytes_uploaded", "Bytes of base backups put into storage.");
pub const PGHOARD_PROGRESS: Metric =
    gauge("pghoard.basebackup_estimated_progress", "Percent of the running base backup.");
pub const PGHOARD_STALLED: Metric = gauge(
    "pghoard.seconds_since_backup_progress_stalled",
    "Seconds since the running base backup last got on.",
);
pub const PGHOARD_RATIO: Metric =
    gauge("pghoard.compressed_size_ratio", "Stored bytes for each byte of the last object.");
pub const PGHOARD_LAST_UPLOAD_AGE: Metric =
    gauge("pghoard.last_upload_age", "Seconds since an object was last stored.");
pub const PGHOARD_XLOGS: Metric =
    gauge("pghoard.xlogs_since_basebackup", "WAL segments stored since the last base backup.");
pub const PGHOARD_TOTAL_UPLOAD: Metric =
    gauge("pghoard.total_upload_size", "Bytes put into storage since the start.");
pub const PGHOARD_UPLOAD: Metric = counter("pghoard.upload_size", "Bytes put into storage.");
pub const PGHOARD_DOWNLOAD: Metric = counter("pghoard.download_size", "Bytes read from storage.");
pub const PGHOARD_TRANSFER_ERRORS: Metric =
    counter("pghoard.transfer_operation_errors", "Requests to storage that failed.");
pub const PGHOARD_PARTIAL: Metric = counter(
    "pghoard.incomplete_partial_wal_segment",
    "Unfinished segments of an odd length, left behind by pg_receivewal.",
);
