//! The state of PostgreSQL, S3 and Kafka at the end of a run, read directly: without the proxies and without the broker.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lfs_broker_client::checksum::Algorithm;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde_json::Value;
use sqlx::{PgPool, Row as _};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::Failure;
use crate::cluster::{BUCKET, Cluster, PARTITIONS, TOPICS};
use crate::journal::JournalEntries;
use crate::plan::Target;

/// How many objects are read concurrently.
const CONCURRENT_READS: usize = 8;

/// A session's row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) state: String,
    pub(crate) topic: String,
    pub(crate) object_key: String,
    pub(crate) pointer: Option<String>,
    /// Partition and offset.
    pub(crate) position: Option<(i32, i64)>,
    pub(crate) cleanup_due: bool,
    pub(crate) verified_at: Option<OffsetDateTime>,
    pub(crate) published_at: Option<OffsetDateTime>,
    pub(crate) error: Option<String>,
    /// The states that the session has entered, in order.
    pub(crate) entered: Vec<String>,
}

/// A record as a consumer of committed records sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Record {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: String,
    /// The record's header `lfs-upload-id`.
    pub(crate) upload_id: Option<Uuid>,
}

/// An object with the hash of its bytes. Objects without a pointer are not read and have no hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) size_bytes: u64,
    pub(crate) sha256: Option<String>,
}

/// Everything that the checker compares.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    pub(crate) sessions: BTreeMap<Uuid, Session>,
    /// Uploads whose pointers are still in the outbox.
    pub(crate) waiting: Vec<Uuid>,
    pub(crate) records: Vec<Record>,
    pub(crate) objects: BTreeMap<String, Object>,
    /// Multipart uploads in S3 that were neither completed nor aborted: each the upload's id, then where it was found.
    pub(crate) uploads: Vec<String>,
    pub(crate) clients: JournalEntries,
    /// Programs that exited by themselves, panics, and findings of `audit`.
    pub(crate) errors: Vec<String>,
}

/// The number of outbox rows and unfinished sessions.
async fn unfinished(pool: &PgPool) -> Result<i64, sqlx::Error> {
    let count = "select (select count(*) from outbox) + (select count(*) from upload_sessions
                 where state in ('open', 'completing', 'verified') or cleanup_due_at is not null)";
    sqlx::query_scalar(count).fetch_one(pool).await
}

/// Waits until every pointer that is in the outbox now is published, and returns how long that took.
pub(crate) async fn wait_until_published(cluster: &Cluster, bound: Duration) -> Result<Duration, Failure> {
    let pool = PgPool::connect(&cluster.database_url).await?;
    let began = Instant::now();
    let last: Option<i64> = sqlx::query_scalar("select max(number) from outbox").fetch_one(&pool).await?;
    let remaining = "select exists (select from outbox where number <= $1)";
    while began.elapsed() < bound && sqlx::query_scalar(remaining).bind(last).fetch_one(&pool).await? {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(began.elapsed())
}

/// Waits until no work is left and returns how long that took. After `bound` it returns anyway, and the checker reports the rest.
pub(crate) async fn wait_until_rest(cluster: &Cluster, bound: Duration) -> Result<Duration, Failure> {
    let pool = PgPool::connect(&cluster.database_url).await?;
    let began = Instant::now();
    while began.elapsed() < bound && unfinished(&pool).await? > 0 {
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    Ok(began.elapsed())
}

/// Reads PostgreSQL, Kafka and S3, the logs of the servers, and the report of `audit`.
pub(crate) async fn collect(cluster: &Cluster, clients: JournalEntries) -> Result<Observed, Failure> {
    let pool = PgPool::connect(&cluster.database_url).await?;
    let sessions = sessions(&pool).await?;
    let waiting = sqlx::query_scalar("select session_id from outbox order by number").fetch_all(&pool).await?;
    pool.close().await;
    let bootstrap = cluster.bootstrap.clone();
    let records = tokio::task::spawn_blocking(move || records(&bootstrap));
    let records = records.await.map_err(|error| Failure(error.to_string()))??;
    let objects = objects(cluster, &sessions, &records).await?;
    let mut uploads = Vec::new();
    let parts = cluster.dir.join("minio/.minio.sys/multipart");
    find_open_uploads(&parts, &mut uploads);
    let mut errors = Vec::new();
    for server in cluster.servers(Target::Everything) {
        errors.extend(server.unexpected_exits().await);
    }
    for replica in &cluster.replicas {
        let panics = replica.log().lines().filter(|line| line.contains("panicked at")).map(str::to_owned).collect::<Vec<_>>();
        errors.extend(panics);
    }
    match cluster.audit(&[]).await {
        Ok(report) => {
            let findings = report["findings"].as_array().into_iter().flatten();
            errors.extend(findings.map(|finding| format!("audit: {}: {finding}", finding["kind"].as_str().unwrap_or_default())));
            if report["clean"] != true && errors.is_empty() {
                errors.push(format!("audit: {report}"));
            }
        }
        Err(error) => errors.push(error.to_string()),
    }
    Ok(Observed { sessions, waiting, records, objects, uploads, clients, errors })
}

async fn sessions(pool: &PgPool) -> Result<BTreeMap<Uuid, Session>, Failure> {
    let mut entered: BTreeMap<Uuid, Vec<String>> = BTreeMap::new();
    let history = "select session_id, to_state from upload_history order by session_id, version";
    for row in sqlx::query(history).fetch_all(pool).await? {
        entered.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
    }
    let rows = "select id, state, topic, object_key, pointer, published_partition, published_offset,
                cleanup_due_at is not null, verified_at, published_at, error_detail from upload_sessions";
    let mut sessions = BTreeMap::new();
    for row in sqlx::query(rows).fetch_all(pool).await? {
        let id: Uuid = row.try_get(0)?;
        let (partition, offset): (Option<i32>, Option<i64>) = (row.try_get(5)?, row.try_get(6)?);
        let session = Session {
            state: row.try_get(1)?,
            topic: row.try_get(2)?,
            object_key: row.try_get(3)?,
            pointer: row.try_get(4)?,
            position: partition.zip(offset),
            cleanup_due: row.try_get(7)?,
            verified_at: row.try_get(8)?,
            published_at: row.try_get(9)?,
            error: row.try_get(10)?,
            entered: entered.remove(&id).unwrap_or_default(),
        };
        sessions.insert(id, session);
    }
    Ok(sessions)
}

/// Lists the bucket, and reads every object that a session's pointer or a record names.
async fn objects(
    cluster: &Cluster,
    sessions: &BTreeMap<Uuid, Session>,
    records: &[Record],
) -> Result<BTreeMap<String, Object>, Failure> {
    let mut referenced: std::collections::HashSet<String> =
        sessions.values().filter(|session| session.pointer.is_some()).map(|session| session.object_key.clone()).collect();
    let named = records.iter().filter_map(|record| serde_json::from_str::<Value>(&record.value).ok());
    referenced.extend(named.filter_map(|pointer| pointer["key"].as_str().map(str::to_owned)));
    let mut objects = BTreeMap::new();
    let mut pages = cluster.s3.list_objects_v2().bucket(BUCKET).into_paginator().send();
    while let Some(page) = pages.next().await {
        let page = page.map_err(|error| Failure(format!("listing the bucket failed: {error:?}")))?;
        for object in page.contents() {
            let size_bytes = object.size().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
            objects.insert(object.key().unwrap_or_default().to_owned(), Object { size_bytes, sha256: None });
        }
    }
    let read: Vec<(String, Object)> = stream::iter(objects.keys().filter(|key| referenced.contains(key.as_str())))
        .map(|key| read_object(cluster, key))
        .buffer_unordered(CONCURRENT_READS)
        .try_collect()
        .await?;
    objects.extend(read);
    Ok(objects)
}

async fn read_object(cluster: &Cluster, key: &str) -> Result<(String, Object), Failure> {
    let failed = |error: String| Failure(format!("reading object {key} failed: {error}"));
    let object = cluster.s3.get_object().bucket(BUCKET).key(key).send().await.map_err(|error| failed(format!("{error:?}")))?;
    let (mut body, mut hasher, mut size_bytes) = (object.body, Algorithm::Sha256.hasher(), 0);
    while let Some(chunk) = body.try_next().await.map_err(|error| failed(error.to_string()))? {
        hasher.update(&chunk);
        size_bytes += chunk.len() as u64;
    }
    Ok((key.to_owned(), Object { size_bytes, sha256: Some(hasher.finish().hex()) }))
}

/// The upload whose object a multipart upload in [`Observed::uploads`] would become.
pub(crate) fn upload_id(upload: &str) -> Option<Uuid> {
    upload.split(' ').next()?.parse().ok()
}

/// Finds open multipart uploads in MinIO's directory, because MinIO lists them by exact key only.
fn find_open_uploads(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            find_open_uploads(&entry.path(), found);
        } else if entry.file_name() == "xl.meta" {
            let meta = std::fs::read(entry.path()).unwrap_or_default();
            let token = b"lfs-upload-id";
            let at = meta.windows(token.len()).position(|window| window.eq_ignore_ascii_case(token));
            let id = at.map(|at| String::from_utf8_lossy(&meta[at + token.len()..]).chars().skip(2).take(36).collect::<String>());
            found.push(format!("{} in {}", id.unwrap_or_else(|| "unknown".into()), entry.path().display()));
        }
    }
}

/// Every committed record of every topic.
fn records(bootstrap: &str) -> Result<Vec<Record>, Failure> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "chaos")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let mut assignment = TopicPartitionList::new();
    for topic in TOPICS {
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
    }
    consumer.assign(&assignment)?;
    let (mut records, mut partitions_read) = (Vec::new(), 0);
    while partitions_read < assignment.count() {
        match consumer.poll(Duration::from_secs(30)) {
            None => return Err(Failure("Kafka returned no record and no end of partition for 30 s".into())),
            Some(Err(KafkaError::PartitionEOF(_))) => partitions_read += 1,
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(message)) => {
                let headers = message.headers();
                let id = headers.and_then(|headers| headers.iter().find(|header| header.key == "lfs-upload-id")?.value);
                records.push(Record {
                    topic: message.topic().to_owned(),
                    partition: message.partition(),
                    offset: message.offset(),
                    key: message.key().map(<[u8]>::to_vec),
                    value: String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
                    upload_id: id.and_then(|id| Uuid::parse_str(std::str::from_utf8(id).ok()?).ok()),
                });
            }
        }
    }
    records.sort_by(|a, b| (&a.topic, a.partition, a.offset).cmp(&(&b.topic, b.partition, b.offset)));
    Ok(records)
}
