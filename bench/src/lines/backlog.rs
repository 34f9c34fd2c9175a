//! Backlog: Kafka is stopped, 10,000 pointers wait in the outbox, and Kafka returns.

use std::time::{Duration, Instant};

use sqlx::{PgConnection, query_scalar};

use crate::broker::Broker;
use crate::report::{Row, Target};
use crate::servers::{PARTITIONS, TOPIC, execute, tenant_name};
use crate::{Failure, Run, kafka};

const DATABASE: &str = "backlog";
const POINTERS: usize = 10_000;
const TARGET: Target = Target::ValueAtMost(5.0);
const RETURN_TIMEOUT: Duration = Duration::from_secs(60);
/// A slower relay fails the line.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(120);

/// Seconds from the moment when Kafka serves the topic again until the outbox is empty.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    run.stop_main_broker().await?;
    run.servers.create_database(DATABASE).await?;
    let broker = Broker::start(&run.servers, DATABASE, DATABASE, &[]).await?;
    super::warm_up(&run.servers, &broker).await?;
    let rounds = if run.plan.is_full { run.plan.rounds } else { 1 };
    let mut seconds = Vec::new();
    for round in 0..rounds {
        run.servers.control("stop", "kafka").await?;
        let published = publish_backlog(run, round).await;
        // The next lines need Kafka, also after a failure.
        if published.is_err() {
            let _ = run.servers.control("start", "kafka").await;
        }
        seconds.push(published?);
    }
    run.rows.push(Row::value(format!("publishing {POINTERS} pointers after Kafka returned, s"), seconds).target(TARGET));
    broker.stop().await
}

async fn publish_backlog(run: &Run, round: usize) -> Result<f64, Failure> {
    let mut database = run.servers.database(DATABASE).await?;
    execute(&mut database, &insert(&format!("backlog-{round}"), POINTERS)).await?;
    let returned = async {
        kafka::wait_until_available(&run.servers.bootstrap, TOPIC, RETURN_TIMEOUT).await?;
        let returned = Instant::now();
        wait_until_published(&mut database, PUBLISH_TIMEOUT).await?;
        Ok(returned.elapsed().as_secs_f64())
    };
    let (seconds, ()) = tokio::try_join!(returned, run.servers.control("start", "kafka"))?;
    Ok(seconds)
}

/// Waits until the outbox is empty.
pub(super) async fn wait_until_published(database: &mut PgConnection, limit: Duration) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        let waiting: i64 = query_scalar("select count(*) from outbox").fetch_one(&mut *database).await?;
        if waiting == 0 {
            return Ok(());
        }
        if began.elapsed() > limit {
            return Err(Failure(format!("{waiting} pointers were not published within {} s", limit.as_secs())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A statement that inserts verified sessions and their outbox rows, spread over all shards and partitions. No other
/// call has the same `name`.
pub(super) fn insert(name: &str, pointers: usize) -> String {
    insert_into(name, pointers, "row_number() over () % (select shards from deployment)")
}

/// [`insert`] with an SQL expression for the shard.
pub(super) fn insert_into(name: &str, pointers: usize, shard: &str) -> String {
    let tenant = tenant_name(0);
    format!(
        "with verified as (
             insert into upload_sessions (id, tenant, subject, state, version, created_at, updated_at, expires_at,
                 expires_latest_at, topic, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode,
                 part_hashes, url_seconds, session_seconds, verified_at, integrity, pointer)
             select gen_random_uuid(), '{tenant}', 'bench', 'verified', 3, now(), now(), now() + interval '1 hour',
                 now() + interval '1 day', '{TOPIC}', 'application/octet-stream', 1024, 'none', 'size', 'bench',
                 '{name}-' || n, 'single', 'none', 900, 3600, now(), 'size', '{{\"kfs_lfs\":1}}'
             from generate_series(1, {pointers}) n
             returning id)
         insert into outbox (session_id, shard, topic, partition, value, headers, created_at, next_try_at)
         select id, {shard}, '{TOPIC}', row_number() over () % {PARTITIONS},
             rpad('{{\"kfs_lfs\":1,', 300, ' ') || '}}', jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), now(), now()
         from verified"
    )
}
