//! The chaos run: replicas, PostgreSQL, Kafka and MinIO run as processes, which are killed and stopped at random. Proxies
//! lose requests and responses between them, while clients upload and retry. In the end a checker compares PostgreSQL,
//! S3 and Kafka with every acknowledged upload.
//!
//! `cargo test --test chaos -- --seed 7 --kills 1000`, or `.ci/chaos`, which also installs the programs. The same seed gives
//! the same faults and the same uploads in the same order. Their exact timing depends on the machine.

mod checker;
mod clients;
mod cluster;
mod database_rollback;
mod faults;
mod http_client;
mod jobs;
mod journal;
mod observed;
mod plan;
mod proxy;
mod self_test;
mod servers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use time::OffsetDateTime;
use tokio::task::JoinSet;

use checker::{Finding, FindingKind, check};
use clients::Worker;
use cluster::Cluster;
use faults::FaultCounts;
use journal::Journal;
use observed::Observed;
use plan::{Fault, Link, Target};

/// How many findings are printed; the last line counts all of them.
const MAX_PRINTED_FINDINGS: usize = 40;

/// How often a run is repeated that Kafka has made invalid.
const ATTEMPTS: usize = 3;

/// The text that Kafka logs when it never finishes a transaction. A node that is its only cluster member and is killed between
/// "commit" and the last marker finds its partitions without a leader while it registers again. It treats them as deleted
/// and calls the transaction complete (seen with 4.3.1). Committed records behind that transaction cannot be read until
/// an operator aborts it with Kafka's own tool. No broker can publish on such a partition.
const UNFINISHED_TRANSACTION: &str = "these partitions are likely deleted already and hence can be skipped";

#[derive(Parser)]
#[command(about = "Kills, stops and disconnects every server while clients upload, and checks every acknowledged upload")]
struct Arguments {
    /// Seed of every random choice
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many processes are killed
    #[arg(long, default_value_t = 1000)]
    kills: usize,
    /// Replicas of the broker
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    replicas: u8,
    /// Clients that upload at the same time
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// Instead of kills: how often PostgreSQL is restored from a copy of some seconds ago while the replicas keep running;
    /// then `lfs-broker audit --fix` lets them publish again
    #[arg(long, value_name = "N")]
    goes_back: Option<usize>,
    /// How long the system may take to come to rest after the last fault: the last session expires, the last lease ends,
    /// and one minute later S3 is cleaned up again
    #[arg(long, default_value_t = 240)]
    rest_seconds: u64,
    /// The broker's program, to test another build
    #[arg(long, default_value = env!("CARGO_BIN_EXE_lfs-broker"))]
    broker: PathBuf,
    /// Keep data and logs also after a run without findings
    #[arg(long)]
    keep: bool,
    /// Only print the planned faults and their times
    #[arg(long)]
    plan: bool,
    /// Only show that the checker can fail
    #[arg(long)]
    self_test: bool,
}

/// Why a run could not finish.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failure(pub(crate) String);

macro_rules! failures {
    ($($error:ty),*) => { $(impl From<$error> for Failure {
        fn from(error: $error) -> Self {
            Self(error.to_string())
        }
    })* };
}
failures!(std::io::Error, sqlx::Error, rdkafka::error::KafkaError);

/// The result of one run.
struct Outcome {
    observed: Observed,
    counts: FaultCounts,
    findings: Vec<Finding>,
    /// How long after the last fault every waiting pointer was published.
    published: Duration,
    rested: Duration,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(run(&arguments))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            println!("the run failed: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Whether there was no finding.
async fn run(arguments: &Arguments) -> Result<bool, Failure> {
    println!("self-test: the checker detects {} kinds of errors", self_test::run()?);
    if arguments.self_test {
        return Ok(true);
    }
    let kills = if arguments.goes_back.is_some() { 0 } else { arguments.kills };
    let plan = plan::generate(arguments.seed, kills, usize::from(arguments.replicas));
    if arguments.plan {
        for event in &plan {
            println!("after {:>4} ms, for {:>4} ms: {:?}", event.delay.as_millis(), event.duration.as_millis(), event.fault);
        }
        return Ok(true);
    }
    let (faults, option) = match arguments.goes_back {
        Some(times) => (format!("PostgreSQL is restored {times} times"), format!("--goes-back {times}")),
        None => (format!("{kills} kills"), format!("--kills {kills}")),
    };
    println!(
        "seed {}, {faults}, {} replicas, {} clients; to repeat: .ci/chaos --seed {0} {option} --replicas {1} --clients {2}",
        arguments.seed, arguments.replicas, arguments.clients
    );
    for _ in 0..ATTEMPTS {
        if let Some(passed) = run_once(arguments, &plan).await? {
            return Ok(passed);
        }
    }
    Err(Failure(format!("Kafka made {ATTEMPTS} runs invalid")))
}

/// Whether there was no finding; `None` if Kafka itself lost a transaction, which makes the run invalid.
async fn run_once(arguments: &Arguments, plan: &[plan::Event]) -> Result<Option<bool>, Failure> {
    let dir = tempfile::Builder::new().prefix("lfs-broker-chaos.").tempdir()?;
    println!("logs and data: {}", dir.path().display());
    let began = Instant::now();
    let log = dir.path().join("kafka.log");
    let result = tokio::select! {
        result = run_faults(arguments, dir.path(), plan) => Some(result),
        () = wait_for_unfinished_transaction(&log) => None,
        () = wait_for_signal() => return Err(Failure("stopped by a signal".into())),
    };
    if let Some(log_line) = unfinished_transaction(&log) {
        println!("invalid after {} s: Kafka never finished a transaction: {log_line}", began.elapsed().as_secs());
        return Ok(None);
    }
    let Some(result) = result else { return Err(Failure("Kafka's log has lost the line about its transaction".into())) };
    let passed = match &result {
        Ok(outcome) => {
            print(outcome, began.elapsed());
            outcome.findings.is_empty()
        }
        Err(_) => false,
    };
    if arguments.keep || !passed {
        let directory: PathBuf = dir.keep();
        println!("data and logs are kept in {}", directory.display());
    }
    if let Ok(outcome) = &result {
        println!("{}", summary(&outcome.findings));
    }
    result.map(|_| Some(passed))
}

/// Returns once Kafka has logged an unfinished transaction.
async fn wait_for_unfinished_transaction(log: &Path) {
    while unfinished_transaction(log).is_none() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// The log line of a transaction that Kafka never finished.
fn unfinished_transaction(log: &Path) -> Option<String> {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().find(|line| line.contains(UNFINISHED_TRANSACTION)).map(|line| line.chars().take(400).collect())
}

async fn wait_for_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        }
        _ => std::future::pending().await,
    }
}

async fn run_faults(arguments: &Arguments, dir: &Path, plan: &[plan::Event]) -> Result<Outcome, Failure> {
    let extra_settings = if arguments.goes_back.is_some() { database_rollback::SETTINGS } else { &[] };
    let cluster = Arc::new(Cluster::start(dir, usize::from(arguments.replicas), arguments.broker.clone(), extra_settings).await?);
    eprintln!("every server runs");
    let journal = Arc::new(Journal::new());
    let is_over = Arc::new(AtomicBool::new(false));
    let replicas: Vec<String> =
        (0..cluster.replicas.len()).map(|number| format!("http://{}", cluster.proxies.address(Link::Http(number)))).collect();
    // The connect timeout detects a hanging connection, as a client in a process of its own would.
    let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(3)).build();
    let http = http.map_err(|error| Failure(error.to_string()))?;
    // The clients end with the run, also when it fails.
    let mut workers = JoinSet::new();
    for number in 0..arguments.clients {
        let (http, replicas) = (http.clone(), replicas.clone());
        let worker = Worker { number, seed: arguments.seed, http, replicas, journal: Arc::clone(&journal) };
        workers.spawn(worker.work(Arc::clone(&is_over)));
    }
    let mut losses = database_rollback::LostCommits::default();
    let counts = match arguments.goes_back {
        Some(times) => {
            losses = database_rollback::run(&cluster, &journal, arguments.seed, times).await?;
            FaultCounts::default()
        }
        None => faults::run(&cluster, plan).await?,
    };
    faults::wait_until_all_run(&cluster).await?;
    eprintln!("every fault is over");
    let published = observed::wait_until_published(&cluster, Duration::from_secs(60)).await?;
    // Some uploads must also succeed after the last fault.
    tokio::time::sleep(Duration::from_secs(3)).await;
    is_over.store(true, Ordering::Relaxed);
    while let Some(worker) = workers.join_next().await {
        worker.map_err(|error| Failure(format!("a client panicked: {error}")))?;
    }
    let rested = observed::wait_until_rest(&cluster, Duration::from_secs(arguments.rest_seconds)).await?;
    eprintln!("at rest after {} s", rested.as_secs());
    let clients = std::mem::take(&mut *journal.entries());
    let mut observed = observed::collect(&cluster, clients).await?;
    for server in cluster.servers(Target::Everything) {
        server.kill().await?;
    }
    if arguments.goes_back.is_some() {
        println!("{}", losses.summary());
        database_rollback::remove_explained(&mut observed, &losses);
    }
    let mut findings = check(&observed);
    findings.extend(
        losses
            .covers_too_little()
            .or_else(|| covers_too_little(&observed, &counts, plan))
            .map(|description| Finding { kind: FindingKind::Wrong, description }),
    );
    Ok(Outcome { observed, counts, findings, published, rested })
}

/// A run with few faults or uploads proves little, so it counts as a failure.
fn covers_too_little(observed: &Observed, counts: &FaultCounts, plan: &[plan::Event]) -> Option<String> {
    let planned = plan.iter().filter(|event| matches!(event.fault, Fault::Kill(_))).count();
    let published = observed.sessions.values().filter(|session| session.state == "published").count();
    if counts.killed < planned {
        return Some(format!("only {} processes were killed", counts.killed));
    }
    let (acknowledged, records) = (observed.clients.acknowledged.len(), observed.records.len());
    let enough = counts.killed.min(50);
    (published < enough || acknowledged < enough || records < enough)
        .then(|| format!("only {acknowledged} acknowledged, {published} published, {records} records: too few to prove anything"))
}

fn print(outcome: &Outcome, elapsed: Duration) {
    let Outcome { observed, counts, findings, published, rested } = outcome;
    let list = |counts: &mut dyn Iterator<Item = (String, u64)>| {
        counts.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    };
    let as_u64 = |count: &usize| *count as u64;
    println!("kills: {} ({})", counts.killed, list(&mut counts.kills.iter().map(|(name, n)| (name.clone(), as_u64(n)))));
    println!("stops: {}", list(&mut counts.stops.iter().map(|(name, n)| (name.clone(), as_u64(n)))));
    println!("toxics: {}", list(&mut counts.toxics.iter().map(|(name, n)| ((*name).to_owned(), as_u64(n)))));
    let mut states = std::collections::BTreeMap::<String, u64>::new();
    for session in observed.sessions.values() {
        *states.entry(session.state.clone()).or_default() += 1;
    }
    println!("uploads: {} ({})", observed.sessions.len(), list(&mut states.into_iter()));
    println!("jobs: {}", list(&mut observed.clients.outcomes.iter().map(|(name, n)| (name.clone(), *n))));
    println!("requests: {}, retries: {}", observed.clients.requests, observed.clients.retries);
    println!(
        "acknowledgements: {}, records: {}, objects: {}",
        observed.clients.acknowledged.len(),
        observed.records.len(),
        observed.objects.len()
    );
    println!("from acknowledgement to record: {}", publish_times(observed));
    println!("from a restart to the next record: {}", restart_times(observed, counts));
    println!("every waiting pointer was in Kafka {} ms after the last fault", published.as_millis());
    println!("at rest after {} s, {} s in all", rested.as_secs(), elapsed.as_secs());
    for finding in findings.iter().take(MAX_PRINTED_FINDINGS) {
        println!("{}: {}", finding.kind, finding.description);
    }
    if findings.len() > MAX_PRINTED_FINDINGS {
        println!("and {} more", findings.len() - MAX_PRINTED_FINDINGS);
    }
}

/// How long pointers waited for Kafka, with the faults.
fn publish_times(observed: &Observed) -> String {
    let milliseconds = observed.sessions.values().filter_map(|session| Some(session.published_at? - session.verified_at?));
    let mut milliseconds: Vec<i128> = milliseconds.map(|wait| wait.whole_milliseconds()).collect();
    milliseconds.sort_unstable();
    let at = |percent: usize| {
        milliseconds.get((milliseconds.len() * percent / 100).min(milliseconds.len().saturating_sub(1))).copied().unwrap_or(0)
    };
    format!("median {} ms, 99 % {} ms, at most {} ms", at(50), at(99), at(100))
}

/// How long after each restart the next record was written, even if other servers were still broken.
fn restart_times(observed: &Observed, counts: &FaultCounts) -> String {
    let mut published: Vec<OffsetDateTime> = observed.sessions.values().filter_map(|session| session.published_at).collect();
    published.sort_unstable();
    let mut longest = std::collections::BTreeMap::<String, i128>::new();
    for (target, recovered) in &counts.recovered {
        let Some(next) = published.get(published.partition_point(|at| at < recovered)) else { continue };
        let wait = (*next - *recovered).whole_milliseconds();
        let name = target.to_string().split('-').next().unwrap_or_default().to_owned();
        let entry = longest.entry(name).or_default();
        *entry = wait.max(*entry);
    }
    longest.iter().map(|(name, wait)| format!("{name} at most {wait} ms")).collect::<Vec<_>>().join(", ")
}

fn summary(findings: &[Finding]) -> String {
    let count = |kind| findings.iter().filter(|finding| finding.kind == kind).count();
    FindingKind::ALL.map(|kind| format!("{} {kind}", count(kind))).join(", ")
}
