//! The lines of the benchmark. Each measures one question and adds its rows to the run.

mod backlog;
mod counts;
mod files;
mod large;
mod memory;
mod open;
mod replicas;
mod resolve;
mod rows;
mod upload;

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::broker::Broker;
use crate::clients::{BrokerClient, Payload, SMALL_BYTES};
use crate::servers::Servers;
use crate::{Failure, Run};

const WARM_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Line {
    /// Opening uploads beside pgbench's one-row insert
    Open,
    /// Opening uploads of one tenant while a commit takes 2 ms
    Commit,
    /// Whole small uploads beside a direct PUT
    Upload,
    /// Complete beside a HEAD, two commits and one Kafka transaction
    Complete,
    /// Resolving pointers beside a HEAD
    Resolve,
    /// Signing part URLs beside the signature alone
    Presign,
    /// 64 MiB and 1 GiB beside direct multipart uploads, with CPU and memory
    Large,
    /// `put` and `get` beside `aws s3 cp` and `mc cp`
    Files,
    /// Statements, transactions and Kafka requests of an open, a complete and an idle minute
    Counts,
    /// The memory of 10,000 open sessions and of 64 multipart uploads
    Memory,
    /// Two and three replicas beside one
    Replicas,
    /// How fast 10,000 waiting pointers are published when Kafka returns
    Backlog,
    /// Open, list and sweep with many rows beside few
    Rows,
}

impl Line {
    /// All lines, in the order of a run.
    pub(crate) const ALL: [Self; 13] = [
        Self::Open,
        Self::Commit,
        Self::Upload,
        Self::Complete,
        Self::Resolve,
        Self::Presign,
        Self::Large,
        Self::Files,
        Self::Counts,
        Self::Memory,
        Self::Replicas,
        Self::Backlog,
        Self::Rows,
    ];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Commit => "commit",
            Self::Upload => "upload",
            Self::Complete => "complete",
            Self::Resolve => "resolve",
            Self::Presign => "presign",
            Self::Large => "large",
            Self::Files => "files",
            Self::Counts => "counts",
            Self::Memory => "memory",
            Self::Replicas => "replicas",
            Self::Backlog => "backlog",
            Self::Rows => "rows",
        }
    }

    /// Measures the line and adds its rows to the run.
    pub(crate) async fn measure(self, run: &mut Run) -> Result<(), Failure> {
        match self {
            Self::Open => open::measure(run).await,
            Self::Commit => open::measure_slow_commit(run).await,
            Self::Upload => upload::measure(run).await,
            Self::Complete => upload::measure_complete(run).await,
            Self::Resolve => resolve::measure(run).await,
            Self::Presign => resolve::measure_presign(run).await,
            Self::Large => large::measure(run).await,
            Self::Files => files::measure(run).await,
            Self::Counts => counts::measure(run).await,
            Self::Memory => memory::measure(run).await,
            Self::Replicas => replicas::measure(run).await,
            Self::Backlog => backlog::measure(run).await,
            Self::Rows => rows::measure(run).await,
        }
    }
}

/// Uploads once for each tenant, so that the broker has opened its connections and its Kafka producers. A broker that has just
/// started may answer "try again" for a while.
pub(crate) async fn warm_up(servers: &Servers, broker: &Broker) -> Result<(), Failure> {
    let (payload, began) = (Payload::random(SMALL_BYTES), Instant::now());
    for token in servers.tokens.iter() {
        let mut client = BrokerClient::new(&[broker.url()], std::slice::from_ref(token));
        while let Err(failure) = client.upload(&payload).await {
            if began.elapsed() > WARM_UP_TIMEOUT {
                return Err(failure);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}
