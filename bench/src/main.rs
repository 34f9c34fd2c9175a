//! The benchmark: compares the broker with what bounds it, in turn, in one run on one machine. Absolute figures change with
//! the machine and its load; the ratios are the result.
//!
//! `.ci/bench [--quick|--full] [LINE...]` builds the broker, starts PostgreSQL with fsync, Kafka and MinIO, and runs this
//! program. It prints a table and writes the same rows as JSON.

mod broker;
mod budgets;
mod clients;
mod http;
mod kafka;
mod limits;
mod lines;
mod load;
mod machine;
mod report;
mod s3;
mod servers;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use broker::Broker;
use lines::Line;
use report::{Report, Row};
use servers::Servers;

/// The database of the broker that most lines share.
pub(crate) const MAIN_DATABASE: &str = "main";

#[derive(Parser)]
#[command(about = "Compares the broker with what bounds it, and prints a table of ratios")]
struct Arguments {
    /// Short samples; at most 5 minutes. This is the default
    #[arg(long)]
    quick: bool,
    /// Long samples and 5 million rows; at most 30 minutes
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// The file for the result as JSON
    #[arg(long, value_name = "FILE", env = "LFS_BENCH_JSON", default_value = "bench.json")]
    json: PathBuf,
    /// Also replaces the table of results in this Markdown file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The lines to measure [default: all]
    #[arg(value_enum, value_name = "LINE")]
    lines: Vec<Line>,
}

/// Why something was not measured.
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
failures!(std::io::Error, sqlx::Error, rdkafka::error::KafkaError, lfs_broker_client::Error);

/// How long and how often the lines measure.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) is_full: bool,
    /// How often measure and limit alternate.
    pub(crate) rounds: usize,
    /// The time of one sample under load.
    pub(crate) sample: Duration,
    /// The end of the run. What is not measured until then is reported as missing.
    pub(crate) deadline: Instant,
}

/// What every line needs.
pub(crate) struct Run {
    pub(crate) servers: Servers,
    pub(crate) plan: Plan,
    /// The rows that the lines have found.
    pub(crate) rows: Vec<Row>,
    /// What a line could not measure, and why.
    pub(crate) missing: Vec<String>,
    /// The broker that most lines share; started by the first of them.
    main: Option<Broker>,
}

impl Plan {
    fn of(arguments: &Arguments) -> Self {
        let is_full = arguments.full && !arguments.quick;
        let (minutes, rounds, seconds) = if is_full { (30, 3, 3) } else { (5, 2, 1) };
        // The stop of the servers and the report need some seconds.
        let deadline = Instant::now() + Duration::from_secs(minutes * 60 - 15);
        Self { is_full, rounds, sample: Duration::from_secs(seconds), deadline }
    }

    /// The time until the end of the run.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

impl Run {
    /// The broker that most lines share. It has served one upload of each tenant, so its caches are warm.
    pub(crate) async fn main_broker(&mut self) -> Result<&Broker, Failure> {
        if self.main.is_none() {
            self.servers.create_database(MAIN_DATABASE).await?;
            let broker = Broker::start(&self.servers, "main", MAIN_DATABASE, &[]).await?;
            lines::warm_up(&self.servers, &broker).await?;
            self.main = Some(broker);
        }
        self.main.as_ref().ok_or_else(|| Failure("no broker runs".into()))
    }

    /// Stops the shared broker, because the line starts its own ones.
    pub(crate) async fn stop_main_broker(&mut self) -> Result<(), Failure> {
        match self.main.take() {
            Some(broker) => broker.stop().await,
            None => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let report = runtime().and_then(|runtime| runtime.block_on(run(&arguments)));
    match report.and_then(|report| show(&report, &arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("the benchmark failed: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Prints the report, and writes it to the files.
fn show(report: &Report, arguments: &Arguments) -> Result<(), Failure> {
    println!("{}\n{}", report.table(), report.notes());
    report.write(&arguments.json)?;
    println!("JSON: {}", arguments.json.display());
    if let Some(markdown) = &arguments.markdown {
        report.write_markdown(markdown)?;
        println!("Markdown: {}", markdown.display());
    }
    Ok(())
}

async fn run(arguments: &Arguments) -> Result<Report, Failure> {
    let plan = Plan::of(arguments);
    let servers = Servers::connect().await?;
    limits::create_tables(&servers).await?;
    let mut report = Report {
        mode: if plan.is_full { "full" } else { "quick" }.to_owned(),
        cores: std::thread::available_parallelism()?.get(),
        ..Report::default()
    };
    let mut run = Run { servers, plan, rows: Vec::new(), missing: Vec::new(), main: None };
    // Always in the same order: the lines that share a broker come first.
    for line in Line::ALL.into_iter().filter(|line| arguments.lines.is_empty() || arguments.lines.contains(line)) {
        let began = Instant::now();
        report.machine.push(machine::measure(&run.servers.dir, line.name())?);
        match tokio::time::timeout(run.plan.remaining(), line.measure(&mut run)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => run.missing.push(format!("{}: {failure}", line.name())),
            Err(_) => run.missing.push(format!("{}: the time of the run was over", line.name())),
        }
        eprintln!("{}: {:.1} s", line.name(), began.elapsed().as_secs_f64());
    }
    run.stop_main_broker().await?;
    report.machine.push(machine::measure(&run.servers.dir, "end")?);
    if arguments.lines.is_empty() || arguments.lines.contains(&Line::Counts) {
        report.exceeded = budgets::exceeded(&run.rows);
    }
    report.rows = run.rows;
    report.missing = run.missing;
    Ok(report)
}
