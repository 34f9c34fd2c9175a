//! Counts, which do not depend on the clock: statements and transactions on PostgreSQL, and requests to Kafka. And what a broker
//! costs while it is idle.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use sqlx::{PgConnection, query_as, query_scalar};

use super::backlog;
use crate::budgets::{self, Budget};
use crate::clients::{BrokerClient, Opened, Payload, SMALL_BYTES, Uploads};
use crate::kafka::{RequestLog, Requests};
use crate::report::{Row, Target, counted};
use crate::servers::execute;
use crate::{Failure, MAIN_DATABASE, Run, load};

/// How many operations are counted. What the workers do meanwhile is subtracted.
const OPENS: usize = 200;
const COMPLETES: usize = 100;
/// How many uploads are made to count the requests to Kafka.
const KAFKA_UPLOADS: usize = 50;
const CONCURRENT_CLIENTS: usize = 32;
/// How many pointers are published at once to count what the relay does for a batch: several batches for each shard.
const POINTERS: usize = 8000;
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(60);
/// The request of Kafka that ends a transaction, so there is one for each batch.
const END_OF_BATCH: &str = "END_TXN";
/// How long a server process may take to report its counts.
const REPORT_TIMEOUT: Duration = Duration::from_secs(20);
const IDLE_CPU: Target = Target::ValueAtMost(0.5);
/// A server process of PostgreSQL reports the transactions that it counted within 10 s after its last statement. Those of the
/// start must not count as those of an idle broker.
const QUIET_BEFORE: Duration = Duration::from_secs(12);
/// So many keys and pointers are stored beside those that are counted: PostgreSQL plans otherwise for a small table.
const STORED_ROWS: usize = 20_000;
/// No deployment of the benchmark has this shard.
const OTHER_SHARD: usize = 99;

/// What PostgreSQL has counted so far.
#[derive(Debug, Clone, Copy)]
struct Counted {
    statements: f64,
    /// Transactions that wrote something: each one is a commit on the disk.
    writes: f64,
    at: Instant,
}

/// What PostgreSQL has counted on the tables that grow with every upload.
#[derive(Debug, Clone, Copy)]
struct TableScans {
    /// Rows that full scans have read.
    rows: i64,
    stored_keys: i64,
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
    let log = RequestLog {
        bootstrap: run.servers.bootstrap.clone(),
        path: run.servers.dir.join("kafka.log"),
        class_path: std::env::var("LFS_BENCH_KAFKA_CLASSES").unwrap_or_default(),
    };
    run.servers.track_statements(true).await?;
    log.set("DEBUG").await?;
    let counted = measure_all(run, &mut database, &log).await;
    log.set("INFO").await?;
    run.servers.track_statements(false).await?;
    counted
}

async fn measure_all(run: &mut Run, database: &mut PgConnection, log: &RequestLog) -> Result<(), Failure> {
    let idle = measure_idle(run, database).await?;
    let payload = Payload::random(SMALL_BYTES);
    let mut main = run.servers.database(MAIN_DATABASE).await?;
    // The statements of this connection do not count, and it makes no full scan.
    execute(&mut main, "set pg_stat_statements.track = 'none'; set enable_seqscan = off").await?;
    let scans = TableScans::now(&mut main).await?;
    let mut opened = measure_opens(run, database, &mut main, idle, &payload).await?;
    opened.truncate(COMPLETES);
    let url = run.main_broker().await?.url().to_owned();
    let mut client = BrokerClient::new(&[&url], &run.servers.tokens[..1]);
    for opened in &opened {
        client.put(opened, &payload).await?;
    }
    measure_completes(run, (database, &mut main), scans, log, idle, &mut client, &opened).await?;
    measure_kafka(run, log).await
}

/// What an open costs, without and with a key. Returns the uploads that were opened without one.
async fn measure_opens(
    run: &mut Run,
    database: &mut PgConnection,
    main: &mut PgConnection,
    idle: Idle,
    payload: &Payload,
) -> Result<Vec<Opened>, Failure> {
    let url = run.main_broker().await?.url().to_owned();
    let mut client = BrokerClient::new(&[&url], &run.servers.tokens[..1]);
    // The statements of the first request on each connection are prepared, and its caches are filled.
    client.upload(payload).await?;
    let mut without_key = Vec::new();
    for (statements, writes, with_key) in
        [(budgets::OPEN, Some(budgets::OPEN_WRITES), false), (budgets::OPEN_WITH_KEY, None, true)]
    {
        if with_key {
            store_keys(main).await?;
            // The first open after that is planned again.
            client.open(payload, with_key).await?;
        }
        let (before, mut opened) = (Counted::now(database).await?, Vec::new());
        for _ in 0..OPENS {
            opened.push(client.open(payload, with_key).await?);
        }
        let found = before.until_now(database, idle, OPENS).await?;
        run.rows.push(statements.row(found.statements));
        run.rows.extend(writes.map(|writes: Budget| writes.row(found.writes)));
        if !with_key {
            without_key = opened;
        }
    }
    Ok(without_key)
}

/// Stores keys of the tenant whose uploads are counted.
async fn store_keys(main: &mut PgConnection) -> Result<(), Failure> {
    let insert = format!(
        "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
         select tenant, subject, 'stored-' || number, sha256(''), id, created_at
         from (select * from upload_sessions where version > 0 order by created_at desc, id desc limit 1) newest,
             generate_series(1, {STORED_ROWS}) number"
    );
    execute(main, &insert).await?;
    execute(main, "analyze idempotency_keys").await
}

/// Stores pointers of a shard that no broker owns: a backlog beside the shards whose statements are counted.
async fn store_pointers(main: &mut PgConnection) -> Result<(), Failure> {
    execute(main, &backlog::insert_into("other-shard", STORED_ROWS, &OTHER_SHARD.to_string())).await?;
    execute(main, "analyze outbox").await
}

/// What a complete costs: what the relay does for a batch, and what remains of a complete whose upload is a batch of its own.
async fn measure_completes(
    run: &mut Run,
    databases: (&mut PgConnection, &mut PgConnection),
    scans: TableScans,
    log: &RequestLog,
    idle: Idle,
    client: &mut BrokerClient,
    opened: &[Opened],
) -> Result<(), Failure> {
    let (database, main) = databases;
    store_pointers(main).await?;
    let (before, position) = (Counted::now(database).await?, log.position()?);
    for opened in opened {
        client.complete(opened).await?;
    }
    let batches = log.settled_since(position).await?.of(END_OF_BATCH);
    let complete = before.until_now(database, idle, opened.len()).await?;
    execute(main, &format!("delete from outbox where shard = {OTHER_SHARD}")).await?;
    let rows = scans.rows_since_for_keys(main, STORED_ROWS + OPENS).await?;
    run.rows.push(budgets::FULL_SCANS.row(rows));
    let batch = measure_relay(database, main, log, idle).await?;
    let share = batch * batches as f64 / opened.len() as f64;
    run.rows.push(budgets::COMPLETE.row((complete.statements - share).max(0.0)));
    run.rows.push(budgets::RELAY.row(batch));
    run.rows.push(budgets::COMPLETE_WRITES.row(complete.writes));
    Ok(())
}

/// Statements of the relay for one batch, while it publishes many pointers that no request waits for.
async fn measure_relay(
    database: &mut PgConnection,
    main: &mut PgConnection,
    log: &RequestLog,
    idle: Idle,
) -> Result<f64, Failure> {
    let (before, position) = (Counted::now(database).await?, log.position()?);
    execute(main, &backlog::insert("counts", POINTERS)).await?;
    backlog::wait_until_published(main, PUBLISH_TIMEOUT).await?;
    let batches = log.settled_since(position).await?.of(END_OF_BATCH);
    if batches == 0 {
        return Err(Failure(format!("Kafka logged no {END_OF_BATCH} of the broker")));
    }
    Ok(before.until_now(database, idle, batches).await?.statements)
}

/// What a broker costs while it is idle, on PostgreSQL and in CPU time.
async fn measure_idle(run: &mut Run, database: &mut PgConnection) -> Result<Idle, Failure> {
    let time = Duration::from_secs(if run.plan.is_full { 60 } else { 15 });
    let broker = run.main_broker().await?;
    tokio::time::sleep(QUIET_BEFORE).await;
    let (before, transactions, cpu) = (Counted::now(database).await?, transactions(database).await?, broker.cpu()?);
    tokio::time::sleep(time).await;
    let (cpu, seconds) = (broker.cpu()?.saturating_sub(cpu), before.at.elapsed().as_secs_f64());
    let transactions = (self::transactions(database).await? - transactions) as f64;
    let none = Idle { statements: 0.0, writes: 0.0 };
    let found = before.until_now(database, none, 1).await?;
    let minute = |count: f64| count * 60.0 / seconds;
    run.rows.push(budgets::IDLE.row(minute(transactions)));
    run.rows.push(Row::value("idle: statements on PostgreSQL in a minute", vec![minute(found.statements)]));
    let percent = cpu.as_secs_f64() * 100.0 / seconds;
    run.rows.push(Row::value("idle: broker CPU, % of a core", vec![percent]).target(IDLE_CPU));
    Ok(Idle { statements: found.statements / seconds, writes: found.writes / seconds })
}

/// The transactions of the broker's database. A server process reports them at most once a second.
async fn transactions(database: &mut PgConnection) -> Result<i64, Failure> {
    let count = "select xact_commit + xact_rollback from pg_stat_database where datname = 'main'";
    Ok(query_scalar(count).fetch_one(database).await?)
}

impl TableScans {
    async fn now(main: &mut PgConnection) -> Result<Self, Failure> {
        let sums = "select coalesce(sum(seq_tup_read), 0)::bigint, coalesce(sum(n_tup_ins) filter (where relname = 'idempotency_keys'), 0)::bigint
             from pg_stat_user_tables where relname in ('upload_sessions', 'upload_history', 'upload_parts', 'idempotency_keys', 'outbox')";
        let (rows, stored_keys) = query_as(sums).fetch_one(main).await?;
        Ok(Self { rows, stored_keys })
    }

    /// The rows that full scans have read since these counts, for each open with a key. `keys` were stored since. A server process reports its counts within
    /// 10 s after its last statement, so this waits until all keys are counted.
    async fn rows_since_for_keys(&self, main: &mut PgConnection, keys: usize) -> Result<f64, Failure> {
        let began = Instant::now();
        while began.elapsed() < REPORT_TIMEOUT {
            let now = Self::now(main).await?;
            if now.stored_keys - self.stored_keys >= keys as i64 {
                return Ok((now.rows - self.rows) as f64 / OPENS as f64);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(Failure(format!("PostgreSQL did not count {keys} new keys within {} s", REPORT_TIMEOUT.as_secs())))
    }
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
        add_kafka_rows(run, clients, (each * clients) as f64, &log.settled_since(position).await?);
    }
    Ok(())
}

fn add_kafka_rows(run: &mut Run, clients: usize, uploads: f64, requests: &Requests) {
    let total = requests.total() as f64 / uploads;
    let name = counted(clients, "client");
    run.rows.push(match clients {
        1 => budgets::KAFKA.row(total),
        _ => Row::value(format!("requests to Kafka for one upload, {name}"), vec![total]),
    });
    for (request, count) in requests.by_name() {
        run.rows.push(Row::value(format!("of these {request}, {name}"), vec![count as f64 / uploads]));
    }
}
