//! Rows: open, list and sweep on a database with many sessions, in turn with the same on a database with few.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use sqlx::{AssertSqlSafe, PgConnection, query_scalar};

use crate::broker::Broker;
use crate::clients::{BrokerClient, Opens, Payload, SMALL_BYTES, SameRequest};
use crate::load;
use crate::report::{Row, Target};
use crate::servers::{Servers, TOPIC, execute, tenant_name};
use crate::{Failure, Plan, Run};

/// Enough for twenty pages. The database with few rows has no more.
const FEW_ROWS: i64 = 2000;
/// How many rows one statement inserts.
const CHUNK: i64 = 100_000;
/// The largest level of any run. The oldest row is as many milliseconds old.
const MAX_ROWS: i64 = 5_000_000;
/// How long a measurement of one level and the insertion of one chunk take on a slow machine. A level begins only if the run has
/// the time for it.
const MEASURE_TIME: Duration = Duration::from_secs(40);
const FILL_TIME: Duration = Duration::from_secs(9);
const LEVELS: [(i64, &str); 3] = [(100_000, "100 thousand"), (1_000_000, "1 million"), (MAX_ROWS, "5 million")];
const SETTINGS: [(&str, &str); 1] = [("LFS_BROKER_SWEEP_SECONDS", "1")];
const OPENING_CLIENTS: usize = 8;
const LISTING_CLIENTS: usize = 2;
const PAGE_ROWS: usize = 50;
const PAGE: usize = 20;
/// How many overdue uploads one sweep ends: five passes.
const OVERDUE: i64 = 500;
const SWEEP_TIMEOUT: Duration = Duration::from_secs(60);
/// The tables that grow with each upload, with their indexes.
const SESSION_BYTES: &str = "select pg_total_relation_size('upload_sessions') + pg_total_relation_size('upload_history')";
const TARGET: Target = Target::RatioAtMost(1.2);
/// What is measured on both databases.
const MEASURES: [&str; 7] = [
    "open, p50",
    "open, p99",
    "first page of a list, p50",
    "first page of a list, p99",
    "page 20 of a list, p50",
    "page 20 of a list, p99",
    "sweep of 500 overdue uploads",
];

#[derive(Deserialize)]
struct Page {
    next_cursor: Option<String>,
}

/// A database with its broker.
struct Side {
    broker: Broker,
    database: PgConnection,
}

/// Latencies at each level, in milliseconds.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    run.stop_main_broker().await?;
    let mut few = start(&run.servers, "few_rows").await?;
    let mut many = start(&run.servers, "many_rows").await?;
    let mut rows = FEW_ROWS;
    let levels = if run.plan.is_full { &LEVELS[..] } else { &LEVELS[..1] };
    for &(level, name) in levels {
        let needed = MEASURE_TIME + FILL_TIME * u32::try_from((level - rows) / CHUNK).unwrap_or(u32::MAX);
        if run.plan.remaining() < needed {
            let seconds = needed.as_secs();
            run.missing
                .push(format!("rows: {name} rows need {seconds} s, and the run has less: run the line alone, or a full run"));
            break;
        }
        while rows < level {
            let next = (rows + CHUNK).min(level);
            fill(&mut many.database, rows, next).await?;
            rows = next;
        }
        // Otherwise the planner's statistics and the write back of the new pages would change during the measurement.
        execute(&mut many.database, "analyze").await?;
        execute(&mut many.database, "checkpoint").await?;
        let (mut values, mut limit_values) = (vec![Vec::new(); MEASURES.len()], vec![Vec::new(); MEASURES.len()]);
        for _ in 0..run.plan.rounds {
            for (side, found) in [(&mut few, &mut limit_values), (&mut many, &mut values)] {
                let measured = measure_side(&run.servers, run.plan, side).await?;
                found.iter_mut().zip(measured).for_each(|(found, value)| found.push(value));
            }
        }
        for ((measure, values), limit_values) in MEASURES.into_iter().zip(values).zip(limit_values) {
            let row = Row::ratio(format!("{measure}, {name} rows, ms"), "2 thousand rows, ms", values, limit_values);
            run.rows.push(row.target(TARGET));
        }
        let bytes: i64 = query_scalar(SESSION_BYTES).fetch_one(&mut many.database).await?;
        let measure = format!("bytes in the database for one published upload, {name} rows");
        run.rows.push(Row::value(measure, vec![bytes as f64 / rows as f64]));
    }
    few.broker.stop().await?;
    many.broker.stop().await
}

async fn start(servers: &Servers, name: &str) -> Result<Side, Failure> {
    servers.create_database(name).await?;
    let mut database = servers.database(name).await?;
    fill(&mut database, 0, FEW_ROWS).await?;
    execute(&mut database, "analyze").await?;
    let broker = Broker::start(servers, name, name, &SETTINGS).await?;
    super::warm_up(servers, &broker).await?;
    Ok(Side { broker, database })
}

/// The values of `MEASURES`.
async fn measure_side(servers: &Servers, plan: Plan, side: &mut Side) -> Result<[f64; MEASURES.len()], Failure> {
    let payload = Payload::random(SMALL_BYTES);
    let client = || BrokerClient::new(&[side.broker.url()], &servers.tokens[..1]);
    let opens = |_| Opens { client: client(), payload: payload.clone(), with_key: false };
    let (opens, _) = load::run((0..OPENING_CLIENTS).map(opens).collect(), plan.sample).await?;
    let first = format!("/lfs/uploads?limit={PAGE_ROWS}");
    let later = page_path(&mut client(), &first).await?;
    let list = |path: &str| SameRequest { client: client(), method: Method::GET, path: path.to_owned(), body: Bytes::new() };
    let (firsts, _) = load::run((0..LISTING_CLIENTS).map(|_| list(&first)).collect(), plan.sample).await?;
    let (laters, _) = load::run((0..LISTING_CLIENTS).map(|_| list(&later)).collect(), plan.sample).await?;
    let [opens, firsts, laters] =
        [opens, firsts, laters].map(|found| [50, 99].map(|percent| found.latencies().percentile_ms(percent)));
    let sweep = sweep(&mut side.database).await?;
    Ok([opens[0], opens[1], firsts[0], firsts[1], laters[0], laters[1], sweep])
}

/// The path of a later page.
async fn page_path(client: &mut BrokerClient, first: &str) -> Result<String, Failure> {
    let mut path = first.to_owned();
    for number in 1..PAGE {
        let page: Page = client.call(Method::GET, &path, 0, &[], Bytes::new()).await?.expect(&[200])?.json()?;
        let cursor = page.next_cursor.ok_or_else(|| Failure(format!("the list ends with page {number}")))?;
        path = format!("{first}&cursor={}", utf8_percent_encode(&cursor, NON_ALPHANUMERIC));
    }
    Ok(path)
}

/// Makes uploads overdue, and returns how many milliseconds the sweeper takes from its first pass to its last one.
async fn sweep(database: &mut PgConnection) -> Result<f64, Failure> {
    let subject = format!("overdue-{}", fastrand::u64(..));
    let tenant = tenant_name(0);
    let insert = format!(
        "with counted as (
             update tenants set open_sessions = open_sessions + {OVERDUE}, reserved_bytes = reserved_bytes + {OVERDUE} * 1024
             where tenant = '{tenant}')
         insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at, topic,
             content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
             session_seconds)
         select gen_random_uuid(), '{tenant}', '{subject}', 'open', now(), now(), now() - interval '1 hour', now(), '{TOPIC}',
             'application/octet-stream', 1024, 'none', 'size', 'bench', '{subject}/' || n, 'single', 'none', 900, 3600
         from generate_series(1, {OVERDUE}) n"
    );
    execute(database, &insert).await?;
    let of_sweep = format!("from upload_sessions where subject = '{subject}' and topic = '{TOPIC}' and tenant = '{tenant}'");
    // The cleanup in S3 is part of a sweep: the next measurement begins when no cleanup is due any more.
    let waiting = format!("select count(*) {of_sweep} and (state = 'open' or cleanup_due_at < now() + interval '1 minute')");
    let began = Instant::now();
    loop {
        let waiting: i64 = query_scalar(AssertSqlSafe(waiting.as_str())).fetch_one(&mut *database).await?;
        if waiting == 0 {
            break;
        }
        if began.elapsed() > SWEEP_TIMEOUT {
            let seconds = SWEEP_TIMEOUT.as_secs();
            return Err(Failure(format!("{waiting} of {OVERDUE} overdue uploads were not swept within {seconds} s")));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let passes = format!(
        "select (extract(epoch from max(at) - min(at)) * 1000)::float8 from upload_history
         where to_state = 'expired' and session_id in (select id {of_sweep})"
    );
    Ok(query_scalar(AssertSqlSafe(passes)).fetch_one(&mut *database).await?)
}

/// Inserts published sessions with the numbers `from` to `to`, oldest first, each with its history.
async fn fill(database: &mut PgConnection, from: i64, to: i64) -> Result<(), Failure> {
    let tenant = tenant_name(0);
    let statement = format!(
        "with published as (
             insert into upload_sessions (id, tenant, subject, state, version, created_at, updated_at, expires_at,
                 expires_latest_at, topic, record_key, content_type, size_bytes, checksum_alg, checksum, min_integrity, bucket,
                 object_key, mode, part_hashes, url_seconds, session_seconds, verified_at, integrity, pointer,
                 published_partition, published_offset, published_at)
             select id, '{tenant}', 'bench', 'published', 4, at, at, at + interval '1 hour', at + interval '1 day', '{TOPIC}',
                 convert_to('key-' || n, 'UTF8'), 'application/octet-stream', 1024, 'sha256', decode(repeat('ab', 32), 'hex'),
                 'sha256', 'bench', object_key, 'single', 'none', 900, 3600, at, 'sha256',
                 '{{\"kfs_lfs\":1,\"bucket\":\"bench\",\"key\":\"' || object_key || '\",\"size\":1024,\"sha256\":\"' ||
                     repeat('ab', 32) || '\",\"content_type\":\"application/octet-stream\"}}',
                 n % 4, n, at
             from generate_series({from} + 1, {to}) n,
                 lateral (select ('01934d2e-7c00-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid as id,
                     now() - ({MAX_ROWS} - n) * interval '1 millisecond' as at) dated,
                 lateral (select '{tenant}/{TOPIC}/lfs/2026/11/28/' || dated.id as object_key) stored
             returning id, created_at)
         insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
         select id, step, created_at, from_state, to_state, 'as this transition of a real upload has it', 'client:bench'
         from published, (values (1, null, 'open'), (3, 'open', 'verified'), (4, 'verified', 'published'))
             transitions (step, from_state, to_state)"
    );
    // In this role, PostgreSQL does not check foreign keys row by row, so that filling takes half of the time.
    execute(database, "set session_replication_role = replica").await?;
    execute(database, &statement).await?;
    execute(database, "set session_replication_role = origin").await
}
