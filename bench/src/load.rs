//! Load: several clients repeat one operation for a fixed time, and the latency of each operation is kept.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::Failure;

/// The longest time of one operation. A longer one fails the line instead of blocking the run.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);

/// A client that can repeat one operation.
pub(crate) trait Work: Send + 'static {
    /// Runs the operation once.
    fn once(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// What a load measured.
#[derive(Debug)]
pub(crate) struct Sample {
    latencies: Latencies,
    elapsed: Duration,
}

/// Latencies, sorted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Latencies(Vec<Duration>);

/// Runs every client for `duration` and returns the clients, so that the next round uses their connections.
pub(crate) async fn run<W: Work>(clients: Vec<W>, duration: Duration) -> Result<(Sample, Vec<W>), Failure> {
    let (began, mut tasks) = (Instant::now(), JoinSet::new());
    for mut client in clients {
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            while began.elapsed() < duration {
                let started = Instant::now();
                once(&mut client).await?;
                latencies.push(started.elapsed());
            }
            Ok::<_, Failure>((latencies, client))
        });
    }
    let (mut latencies, mut clients) = (Vec::new(), Vec::new());
    while let Some(joined) = tasks.join_next().await {
        let (found, client) = joined.map_err(|error| Failure(format!("a client failed: {error}")))??;
        latencies.extend(found);
        clients.push(client);
    }
    let sample = Sample { latencies: Latencies::new(latencies), elapsed: began.elapsed() };
    Ok((sample, clients))
}

/// Runs each client's operation `times` times, one client after the other.
pub(crate) async fn repeat<W: Work>(client: &mut W, times: usize) -> Result<(), Failure> {
    for _ in 0..times {
        once(client).await?;
    }
    Ok(())
}

async fn once<W: Work>(client: &mut W) -> Result<(), Failure> {
    match tokio::time::timeout(OPERATION_TIMEOUT, client.once()).await {
        Ok(done) => done,
        Err(_) => Err(Failure(format!("an operation did not end within {} s", OPERATION_TIMEOUT.as_secs()))),
    }
}

impl Sample {
    /// Operations per second.
    pub(crate) fn per_second(&self) -> f64 {
        self.latencies.count() as f64 / self.elapsed.as_secs_f64()
    }

    /// How many operations ended.
    pub(crate) fn count(&self) -> usize {
        self.latencies.count()
    }

    /// The latencies of the operations.
    pub(crate) fn latencies(&self) -> &Latencies {
        &self.latencies
    }
}

impl Latencies {
    /// Sorts the latencies.
    pub(crate) fn new(mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        Self(latencies)
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    /// The latency in milliseconds that this share of the operations does not exceed; `NaN` without operations.
    pub(crate) fn percentile_ms(&self, percent: u32) -> f64 {
        let rank = (self.0.len() * percent as usize).div_ceil(100).max(1);
        self.0.get(rank - 1).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_latency_of_its_rank() {
        let latencies = Latencies::new((1..=200).rev().map(Duration::from_millis).collect());
        assert_eq!((latencies.percentile_ms(50), latencies.percentile_ms(99)), (100.0, 198.0));
        let one = Latencies::new(vec![Duration::from_millis(7)]);
        assert_eq!((one.percentile_ms(50), one.percentile_ms(99)), (7.0, 7.0));
        assert!(Latencies::default().percentile_ms(50).is_nan());
    }
}
