//! The machine: how long an fsync takes, and how busy the machine is. Both change while a run lasts, and explain its ratios.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::load::Latencies;
use crate::report::Machine;

/// The longest time of one measurement.
const MEASURE_TIME: Duration = Duration::from_millis(500);
/// The size of one write: a page of PostgreSQL's log.
const PAGE: [u8; 8192] = [7; 8192];

/// Measures the machine before a line. `dir` is on the disk of the servers.
pub(crate) fn measure(dir: &Path, before: &str) -> Result<Machine, Failure> {
    let path = dir.join("fsync");
    let mut file = File::create(&path)?;
    let (began, mut latencies) = (Instant::now(), Vec::new());
    while began.elapsed() < MEASURE_TIME {
        // The file keeps its size, like a segment of PostgreSQL's log, so that fdatasync writes no metadata.
        file.rewind()?;
        file.write_all(&PAGE)?;
        let started = Instant::now();
        file.sync_data()?;
        latencies.push(started.elapsed());
    }
    std::fs::remove_file(path)?;
    let latencies = Latencies::new(latencies);
    Ok(Machine {
        before: before.to_owned(),
        fsync_ms_p50: latencies.percentile_ms(50),
        fsync_ms_p99: latencies.percentile_ms(99),
        load: load()?,
    })
}

/// The load average of the last minute.
fn load() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let load = text.split(' ').next().and_then(|number| number.parse().ok());
    load.ok_or_else(|| Failure(format!("/proc/loadavg has no number: {text}")))
}
