//! The chaos run: replicas, PostgreSQL, Kafka and MinIO in processes of their own, which are killed and stopped at random
//! while proxies lose requests and answers between them, and clients that go on trying. At rest a checker asks
//! PostgreSQL, S3 and Kafka whether every promise was kept.
//!
//! `cargo test --test chaos -- --seed 7 --kills 1000`, or `.ci/chaos`, which also brings the programs. The same seed gives
//! the same faults and the same uploads in the same order; when exactly they meet is up to the machine.

mod caller;
mod checker;
mod clients;
mod facts;
mod faults;
mod goes_back;
mod jobs;
mod journal;
mod parts;
mod plan;
mod proxy;
mod self_test;
mod stage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use time::OffsetDateTime;
use tokio::task::JoinSet;

use checker::{Finding, Verdict, check};
use clients::Worker;
use facts::Facts;
use faults::Tally;
use journal::Journal;
use plan::{Fault, Link, Target};
use stage::Stage;

/// Findings that are printed; the numbers go on.
const SHOWN: usize = 40;

/// How often a run is begun again that Kafka made void.
const ATTEMPTS: usize = 3;

/// What Kafka logs when it leaves a transaction without its end. A node that is killed between "commit" and the last
/// marker, and is the only one, finds its partitions without a leader while it registers again, takes them for deleted and
/// calls the transaction complete (seen with 4.3.1). From then on no committed record behind it can be read, until an
/// operator aborts the transaction with Kafka's own tool: nothing that a broker on top could keep its promises on.
const LEFT_WITHOUT_END: &str = "these partitions are likely deleted already and hence can be skipped";

#[derive(Parser)]
#[command(about = "Kills, stops and cuts off every part while clients upload, and checks that every promise was kept")]
struct Arguments {
    /// What chance follows
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
    /// Instead of kills: how often PostgreSQL goes back to a copy of some seconds ago, under replicas that live on; then
    /// `lfs-broker audit --fix` lets them go on
    #[arg(long, value_name = "N")]
    goes_back: Option<usize>,
    /// How long everything may take to come to rest once all is healed: the last session expires, the last lease runs
    /// out, and a minute after that S3 is swept again
    #[arg(long, default_value_t = 240)]
    rest_seconds: u64,
    /// The broker's program, to try another build of it
    #[arg(long, default_value = env!("CARGO_BIN_EXE_lfs-broker"))]
    broker: PathBuf,
    /// Keep data and logs also when nothing was wrong
    #[arg(long)]
    keep: bool,
    /// Only print what would go wrong, and when
    #[arg(long)]
    plan: bool,
    /// Only show that the checker can fail
    #[arg(long)]
    self_test: bool,
}

/// Why a run could not be brought to its end.
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

/// What one run came to.
struct Outcome {
    facts: Facts,
    tally: Tally,
    findings: Vec<Finding>,
    /// How long the pointers that waited took once all was healed.
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
            println!("the run broke off: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was wrong.
async fn run(arguments: &Arguments) -> Result<bool, Failure> {
    println!("self-test: the checker fails in {} ways, as it should", self_test::run()?);
    if arguments.self_test {
        return Ok(true);
    }
    let kills = if arguments.goes_back.is_some() { 0 } else { arguments.kills };
    let plan = plan::draw(arguments.seed, kills, usize::from(arguments.replicas));
    if arguments.plan {
        for event in &plan {
            println!("after {:>4} ms, for {:>4} ms: {:?}", event.gap.as_millis(), event.lasts.as_millis(), event.fault);
        }
        return Ok(true);
    }
    let (what, option) = match arguments.goes_back {
        Some(times) => (format!("PostgreSQL goes back {times} times"), format!("--goes-back {times}")),
        None => (format!("{kills} kills"), format!("--kills {kills}")),
    };
    println!(
        "seed {}, {what}, {} replicas, {} clients; to see the same again: .ci/chaos --seed {0} {option} --replicas {1} --clients {2}",
        arguments.seed, arguments.replicas, arguments.clients
    );
    for _ in 0..ATTEMPTS {
        if let Some(sound) = once(arguments, &plan).await? {
            return Ok(sound);
        }
    }
    Err(Failure(format!("Kafka made {ATTEMPTS} runs void")))
}

/// Whether nothing was wrong; none where Kafka itself broke what the promises stand on.
async fn once(arguments: &Arguments, plan: &[plan::Event]) -> Result<Option<bool>, Failure> {
    let dir = tempfile::Builder::new().prefix("lfs-broker-chaos.").tempdir()?;
    println!("logs and data: {}", dir.path().display());
    let began = Instant::now();
    let log = dir.path().join("kafka.log");
    let played = tokio::select! {
        played = play(arguments, dir.path(), plan) => Some(played),
        () = left_without_end(&log) => None,
        () = asked_to_end() => return Err(Failure("asked to end".into())),
    };
    if let Some(words) = skipped(&log) {
        println!("void after {} s: Kafka left a transaction without its end: {words}", began.elapsed().as_secs());
        return Ok(None);
    }
    let Some(played) = played else { return Err(Failure("Kafka took its words back".into())) };
    let sound = match &played {
        Ok(outcome) => {
            print(outcome, began.elapsed());
            outcome.findings.is_empty()
        }
        Err(_) => false,
    };
    if arguments.keep || !sound {
        let kept: PathBuf = dir.keep();
        println!("kept: {}", kept.display());
    }
    if let Ok(outcome) = &played {
        println!("{}", verdict(&outcome.findings));
    }
    played.map(|_| Some(sound))
}

/// Returns once Kafka has said so.
async fn left_without_end(log: &Path) {
    while skipped(log).is_none() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Kafka's own words, where it left a transaction without its end.
fn skipped(log: &Path) -> Option<String> {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().find(|line| line.contains(LEFT_WITHOUT_END)).map(|line| line.chars().take(400).collect())
}

async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        }
        _ => std::future::pending().await,
    }
}

async fn play(arguments: &Arguments, dir: &Path, plan: &[plan::Event]) -> Result<Outcome, Failure> {
    let more = if arguments.goes_back.is_some() { goes_back::SETTINGS } else { &[] };
    let stage = Arc::new(Stage::set(dir, usize::from(arguments.replicas), arguments.broker.clone(), more).await?);
    eprintln!("everything runs");
    let journal = Arc::new(Journal::new());
    let ended = Arc::new(AtomicBool::new(false));
    let replicas: Vec<String> =
        (0..stage.replicas.len()).map(|number| format!("http://{}", stage.proxies.address(Link::Http(number)))).collect();
    // A connection that hangs is noticed, as clients of their own processes would; one that is refused at once.
    let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(3)).build();
    let http = http.map_err(|error| Failure(error.to_string()))?;
    // They end with the run, also where it breaks off.
    let mut workers = JoinSet::new();
    for number in 0..arguments.clients {
        let (http, replicas) = (http.clone(), replicas.clone());
        let worker = Worker { number, seed: arguments.seed, http, replicas, journal: Arc::clone(&journal) };
        workers.spawn(worker.work(Arc::clone(&ended)));
    }
    let mut lost = goes_back::Lost::default();
    let tally = match arguments.goes_back {
        Some(times) => {
            lost = goes_back::play(&stage, &journal, arguments.seed, times).await?;
            Tally::default()
        }
        None => faults::play(&stage, plan).await?,
    };
    faults::all_up(&stage).await?;
    eprintln!("all faults are over");
    let published = facts::published(&stage, Duration::from_secs(60)).await?;
    // A little of everything also has to work afterwards.
    tokio::time::sleep(Duration::from_secs(3)).await;
    ended.store(true, Ordering::Relaxed);
    while let Some(worker) = workers.join_next().await {
        worker.map_err(|error| Failure(format!("a client ended badly: {error}")))?;
    }
    let rested = facts::rest(&stage, Duration::from_secs(arguments.rest_seconds)).await?;
    eprintln!("rests after {} s", rested.as_secs());
    let known = std::mem::take(&mut *journal.known());
    let mut facts = facts::gather(&stage, known).await?;
    for part in stage.parts(Target::Everything) {
        part.kill().await?;
    }
    if arguments.goes_back.is_some() {
        println!("{}", lost.words());
        goes_back::forgive(&mut facts, &lost);
    }
    let mut findings = check(&facts);
    findings.extend(
        lost.too_little().or_else(|| too_little(&facts, &tally, plan)).map(|what| Finding { verdict: Verdict::Wrong, what }),
    );
    Ok(Outcome { facts, tally, findings, published, rested })
}

/// A run in which little happened shows little.
fn too_little(facts: &Facts, tally: &Tally, plan: &[plan::Event]) -> Option<String> {
    let planned = plan.iter().filter(|event| matches!(event.fault, Fault::Kill(_))).count();
    let published = facts.sessions.values().filter(|session| session.state == "published").count();
    if tally.killed < planned {
        return Some(format!("only {} processes were killed", tally.killed));
    }
    let (promises, records) = (facts.known.promises.len(), facts.records.len());
    let enough = tally.killed.min(50);
    (published < enough || promises < enough || records < enough)
        .then(|| format!("only {promises} promises, {published} published, {records} records: that shows nothing"))
}

fn print(outcome: &Outcome, took: Duration) {
    let Outcome { facts, tally, findings, published, rested } = outcome;
    let list = |counts: &mut dyn Iterator<Item = (String, u64)>| {
        counts.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    };
    let counted = |count: &usize| *count as u64;
    println!("kills: {} ({})", tally.killed, list(&mut tally.kills.iter().map(|(name, n)| (name.clone(), counted(n)))));
    println!("stops: {}", list(&mut tally.stops.iter().map(|(name, n)| (name.clone(), counted(n)))));
    println!("toxics: {}", list(&mut tally.toxics.iter().map(|(name, n)| ((*name).to_owned(), counted(n)))));
    let mut states = std::collections::BTreeMap::<String, u64>::new();
    for session in facts.sessions.values() {
        *states.entry(session.state.clone()).or_default() += 1;
    }
    println!("uploads: {} ({})", facts.sessions.len(), list(&mut states.into_iter()));
    println!("jobs: {}", list(&mut facts.known.outcomes.iter().map(|(name, n)| (name.clone(), *n))));
    println!("requests: {}, tried again: {}", facts.known.requests, facts.known.retries);
    println!(
        "promises heard: {}, records: {}, objects: {}",
        facts.known.promises.len(),
        facts.records.len(),
        facts.objects.len()
    );
    println!("from promise to record: {}", waits(facts));
    println!("from a restart to the next record: {}", restarts(facts, tally));
    println!("once all was healed, every pointer that waited was in Kafka after {} ms", published.as_millis());
    println!("at rest after {} s, in all {} s", rested.as_secs(), took.as_secs());
    for finding in findings.iter().take(SHOWN) {
        println!("{}: {}", finding.verdict, finding.what);
    }
    if findings.len() > SHOWN {
        println!("and {} more", findings.len() - SHOWN);
    }
}

/// How long pointers waited, faults included.
fn waits(facts: &Facts) -> String {
    let waited = facts.sessions.values().filter_map(|session| Some(session.published_at? - session.verified_at?));
    let mut waited: Vec<i128> = waited.map(|wait| wait.whole_milliseconds()).collect();
    waited.sort_unstable();
    let at = |share: usize| waited.get((waited.len() * share / 100).min(waited.len().saturating_sub(1))).copied().unwrap_or(0);
    format!("median {} ms, 99 % {} ms, at most {} ms", at(50), at(99), at(100))
}

/// How long after a restart the next record was written, whatever else was broken meanwhile.
fn restarts(facts: &Facts, tally: &Tally) -> String {
    let mut published: Vec<OffsetDateTime> = facts.sessions.values().filter_map(|session| session.published_at).collect();
    published.sort_unstable();
    let mut longest = std::collections::BTreeMap::<String, i128>::new();
    for (target, back) in &tally.back {
        let Some(next) = published.get(published.partition_point(|at| at < back)) else { continue };
        let wait = (*next - *back).whole_milliseconds();
        let name = target.to_string().split('-').next().unwrap_or_default().to_owned();
        let entry = longest.entry(name).or_default();
        *entry = wait.max(*entry);
    }
    longest.iter().map(|(name, wait)| format!("{name} at most {wait} ms")).collect::<Vec<_>>().join(", ")
}

fn verdict(findings: &[Finding]) -> String {
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    Verdict::ALL.map(|verdict| format!("{} {verdict}", count(verdict))).join(", ")
}
