//! Counts, which do not depend on the clock: statements and transactions on PostgreSQL, and requests to Kafka. And what a broker
//! costs that nobody asks anything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use sqlx::{PgConnection, query_as, query_scalar};

use crate::clients::{BrokerClient, Payload, SMALL_BYTES, Uploads};
use crate::kafka::RequestLog;
use crate::report::{Row, Target, counted};
use crate::servers::execute;
use crate::{Failure, Run, load};

/// How many operations are counted. What the workers do meanwhile is subtracted.
const OPENS: usize = 200;
const COMPLETES: usize = 100;
/// How many uploads are made to count the requests to Kafka.
const KAFKA_UPLOADS: usize = 50;
const CONCURRENT_CLIENTS: usize = 32;
const OPEN: Target = Target::ValueAtMost(2.0);
/// Four of complete itself, and three of the relay for the batch.
const COMPLETE: Target = Target::ValueAtMost(7.0);
const IDLE_TRANSACTIONS: Target = Target::ValueAtMost(60.0);
const IDLE_CPU: Target = Target::ValueAtMost(0.5);
/// A broker that has just served requests still closes connections and commits offsets.
const QUIET_BEFORE: Duration = Duration::from_secs(2);

/// What PostgreSQL has counted so far.
#[derive(Debug, Clone, Copy)]
struct Counted {
    statements: f64,
    /// Transactions that wrote something: each one is a commit on the disk.
    writes: f64,
    at: Instant,
}

/// Counts for each second of an idle broker.
#[derive(Debug, Clone, Copy)]
struct Idle {
    statements: f64,
    writes: f64,
}

/// All counts.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    run.main_broker().await?;
    let mut database = run.servers.database("postgres").await?;
    execute(&mut database, "create extension if not exists pg_stat_statements").await?;
    run.servers.track_statements(true).await?;
    let counted = measure_postgres(run, &mut database).await;
    run.servers.track_statements(false).await?;
    counted?;
    let log = RequestLog {
        bootstrap: run.servers.bootstrap.clone(),
        path: run.servers.dir.join("kafka.log"),
        class_path: std::env::var("LFS_BENCH_KAFKA_CLASSES").unwrap_or_default(),
    };
    log.set("DEBUG").await?;
    let counted = measure_kafka(run, &log).await;
    log.set("INFO").await?;
    counted
}

async fn measure_postgres(run: &mut Run, database: &mut PgConnection) -> Result<(), Failure> {
    let idle = measure_idle(run, database).await?;
    let tokens = run.servers.tokens.clone();
    let url = run.main_broker().await?.url().to_owned();
    let (mut client, payload) = (BrokerClient::new(&[&url], &tokens[..1]), Payload::random(SMALL_BYTES));
    // The statements of the first request on each connection are prepared, and its caches are filled.
    client.upload(&payload).await?;

    let before = Counted::now(database).await?;
    let mut opened = Vec::new();
    for _ in 0..OPENS {
        opened.push(client.open(&payload, false).await?);
    }
    add_rows(run, "open", &before.until_now(database, idle, OPENS).await?, OPEN);
    let before = Counted::now(database).await?;
    for _ in 0..OPENS {
        client.open(&payload, true).await?;
    }
    add_rows(run, "open with Idempotency-Key", &before.until_now(database, idle, OPENS).await?, OPEN);
    opened.truncate(COMPLETES);
    for opened in &opened {
        client.put(opened, &payload).await?;
    }
    let before = Counted::now(database).await?;
    for opened in &opened {
        client.complete(opened).await?;
    }
    // The relay may still mark the last record.
    tokio::time::sleep(Duration::from_millis(200)).await;
    add_rows(run, "complete, with its publication", &before.until_now(database, idle, COMPLETES).await?, COMPLETE);
    Ok(())
}

fn add_rows(run: &mut Run, operation: &str, counted: &Idle, target: Target) {
    let statements = Row::value(format!("statements on PostgreSQL for one {operation}"), vec![counted.statements]);
    run.rows.push(statements.target(target));
    run.rows.push(Row::value(format!("transactions that write for one {operation}"), vec![counted.writes]));
}

/// What a broker costs that nobody asks anything, on PostgreSQL and in CPU time.
async fn measure_idle(run: &mut Run, database: &mut PgConnection) -> Result<Idle, Failure> {
    let time = Duration::from_secs(if run.plan.is_full { 60 } else { 10 });
    let broker = run.main_broker().await?;
    tokio::time::sleep(QUIET_BEFORE).await;
    let (before, transactions, cpu) = (Counted::now(database).await?, transactions(database).await?, broker.cpu()?);
    tokio::time::sleep(time).await;
    let (cpu, seconds) = (broker.cpu()?.saturating_sub(cpu), before.at.elapsed().as_secs_f64());
    let transactions = (self::transactions(database).await? - transactions) as f64;
    let none = Idle { statements: 0.0, writes: 0.0 };
    let found = before.until_now(database, none, 1).await?;
    let minute = |count: f64| vec![count * 60.0 / seconds];
    run.rows.push(Row::value("idle: transactions on PostgreSQL in a minute", minute(transactions)).target(IDLE_TRANSACTIONS));
    run.rows.push(Row::value("idle: statements on PostgreSQL in a minute", minute(found.statements)));
    let percent = cpu.as_secs_f64() * 100.0 / seconds;
    run.rows.push(Row::value("idle: broker CPU, % of a core", vec![percent]).target(IDLE_CPU));
    Ok(Idle { statements: found.statements / seconds, writes: found.writes / seconds })
}

/// The transactions of the broker's database. A server process reports them at most once a second.
async fn transactions(database: &mut PgConnection) -> Result<i64, Failure> {
    let count = "select xact_commit + xact_rollback from pg_stat_database where datname = 'main'";
    Ok(query_scalar(count).fetch_one(database).await?)
}

impl Counted {
    async fn now(database: &mut PgConnection) -> Result<Self, Failure> {
        // The next transaction number of the server: only a transaction that writes takes one, and this query does not.
        let counts = "select coalesce(sum(calls), 0)::bigint, pg_snapshot_xmax(pg_current_snapshot())::text::bigint
             from pg_stat_statements where dbid = (select oid from pg_database where datname = 'main')";
        let (statements, writes): (i64, i64) = query_as(counts).fetch_one(database).await?;
        Ok(Self { statements: statements as f64, writes: writes as f64, at: Instant::now() })
    }

    /// What each of `operations` has cost since this count, without the work of the idle broker.
    async fn until_now(&self, database: &mut PgConnection, idle: Idle, operations: usize) -> Result<Idle, Failure> {
        let now = Self::now(database).await?;
        let seconds = (now.at - self.at).as_secs_f64();
        let each = |count: f64, idle: f64| (count - idle * seconds).max(0.0) / operations as f64;
        Ok(Idle {
            statements: each(now.statements - self.statements, idle.statements),
            writes: each(now.writes - self.writes, idle.writes),
        })
    }
}

/// Requests to Kafka for one upload, alone and under load.
async fn measure_kafka(run: &mut Run, log: &RequestLog) -> Result<(), Failure> {
    let (tokens, payload) = (run.servers.tokens.clone(), Payload::random(SMALL_BYTES));
    let url = run.main_broker().await?.url().to_owned();
    for clients in [1, CONCURRENT_CLIENTS] {
        let each = KAFKA_UPLOADS.div_ceil(clients);
        let position = log.position()?;
        let uploading = (0..clients).map(|_| {
            let mut uploads = Uploads::new(BrokerClient::new(&[&url], &tokens[..1]), &payload);
            async move { load::repeat(&mut uploads, each).await }
        });
        try_join_all(uploading).await?;
        // Kafka logs a request after its response was sent.
        tokio::time::sleep(Duration::from_secs(1)).await;
        add_kafka_rows(run, clients, (each * clients) as f64, &log.requests_since(position)?)?;
    }
    Ok(())
}

fn add_kafka_rows(run: &mut Run, clients: usize, uploads: f64, counts: &BTreeMap<String, usize>) -> Result<(), Failure> {
    if counts.is_empty() {
        return Err(Failure("Kafka logged no request of the broker".into()));
    }
    let total: usize = counts.values().sum();
    let clients = counted(clients, "client");
    let all = format!("requests to Kafka for one upload, {clients}");
    run.rows.push(Row::value(all, vec![total as f64 / uploads]));
    for (name, count) in counts {
        let measure = format!("of these {name}, {clients}");
        run.rows.push(Row::value(measure, vec![*count as f64 / uploads]));
    }
    Ok(())
}
