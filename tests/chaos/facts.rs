//! What PostgreSQL, S3 and Kafka say once everything rests: asked directly, around every proxy and around the broker.

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
use crate::journal::Known;
use crate::plan::Target;
use crate::stage::{BUCKET, PARTITIONS, Stage, TOPICS};

/// Objects that are read again at the same time.
const AT_ONCE: usize = 8;

/// A session's row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) state: String,
    pub(crate) topic: String,
    pub(crate) object_key: String,
    pub(crate) pointer: Option<String>,
    /// Partition and offset.
    pub(crate) place: Option<(i32, i64)>,
    pub(crate) cleanup_due: bool,
    pub(crate) verified_at: Option<OffsetDateTime>,
    pub(crate) published_at: Option<OffsetDateTime>,
    pub(crate) error: Option<String>,
    /// The states that it entered, in order.
    pub(crate) entered: Vec<String>,
}

/// A record as a reader of committed ones sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Record {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: String,
    /// `lfs-upload-id`.
    pub(crate) upload_id: Option<Uuid>,
}

/// An object as it was read again; one that no pointer names is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) size_bytes: u64,
    pub(crate) sha256: Option<String>,
}

/// Everything that the checker judges.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub(crate) sessions: BTreeMap<Uuid, Session>,
    /// Uploads whose pointers still wait in the outbox.
    pub(crate) waiting: Vec<Uuid>,
    pub(crate) records: Vec<Record>,
    pub(crate) objects: BTreeMap<String, Object>,
    /// What S3 has of multipart uploads that were neither completed nor aborted.
    pub(crate) uploads: Vec<String>,
    pub(crate) known: Known,
    /// Programs that ended by themselves, panics, and what `audit` found.
    pub(crate) complaints: Vec<String>,
}

/// What is not over yet.
async fn unrest(pool: &PgPool) -> Result<i64, sqlx::Error> {
    let count = "select (select count(*) from outbox) + (select count(*) from upload_sessions
                 where state in ('open', 'completing', 'verified') or cleanup_due_at is not null)";
    sqlx::query_scalar(count).fetch_one(pool).await
}

/// Waits until everything that is promised by now is in Kafka, and says how long that took.
pub(crate) async fn published(stage: &Stage, bound: Duration) -> Result<Duration, Failure> {
    let pool = PgPool::connect(&stage.database_url).await?;
    let began = Instant::now();
    let last: Option<i64> = sqlx::query_scalar("select max(number) from outbox").fetch_one(&pool).await?;
    let left = "select exists (select from outbox where number <= $1)";
    while began.elapsed() < bound && sqlx::query_scalar(left).bind(last).fetch_one(&pool).await? {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(began.elapsed())
}

/// Waits until nothing is under way any more, and says how long that took; after `bound` the checker has to say what is.
pub(crate) async fn rest(stage: &Stage, bound: Duration) -> Result<Duration, Failure> {
    let pool = PgPool::connect(&stage.database_url).await?;
    let began = Instant::now();
    while began.elapsed() < bound && unrest(&pool).await? > 0 {
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    Ok(began.elapsed())
}

/// Asks all three, and those who watched.
pub(crate) async fn gather(stage: &Stage, known: Known) -> Result<Facts, Failure> {
    let pool = PgPool::connect(&stage.database_url).await?;
    let sessions = sessions(&pool).await?;
    let waiting = sqlx::query_scalar("select session_id from outbox order by number").fetch_all(&pool).await?;
    pool.close().await;
    let bootstrap = stage.bootstrap.clone();
    let records = tokio::task::spawn_blocking(move || records(&bootstrap));
    let records = records.await.map_err(|error| Failure(error.to_string()))??;
    let objects = objects(stage, &sessions, &records).await?;
    let mut uploads = Vec::new();
    let parts = stage.dir.join("minio/.minio.sys/multipart");
    leftovers(&parts, &mut uploads);
    let mut complaints = Vec::new();
    for part in stage.parts(Target::Everything) {
        complaints.extend(part.ended_alone().await);
    }
    for replica in &stage.replicas {
        let panics = replica.log().lines().filter(|line| line.contains("panicked at")).map(str::to_owned).collect::<Vec<_>>();
        complaints.extend(panics);
    }
    match stage.audit(&[]).await {
        Ok(report) => {
            let findings = report["findings"].as_array().into_iter().flatten();
            complaints
                .extend(findings.map(|finding| format!("audit: {}: {finding}", finding["kind"].as_str().unwrap_or_default())));
            if report["clean"] != true && complaints.is_empty() {
                complaints.push(format!("audit: {report}"));
            }
        }
        Err(error) => complaints.push(error.to_string()),
    }
    Ok(Facts { sessions, waiting, records, objects, uploads, known, complaints })
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
            place: partition.zip(offset),
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

/// Lists the bucket and reads again what a session's pointer or a record names.
async fn objects(
    stage: &Stage,
    sessions: &BTreeMap<Uuid, Session>,
    records: &[Record],
) -> Result<BTreeMap<String, Object>, Failure> {
    let mut pointed: std::collections::HashSet<String> =
        sessions.values().filter(|session| session.pointer.is_some()).map(|session| session.object_key.clone()).collect();
    let named = records.iter().filter_map(|record| serde_json::from_str::<Value>(&record.value).ok());
    pointed.extend(named.filter_map(|pointer| pointer["key"].as_str().map(str::to_owned)));
    let mut objects = BTreeMap::new();
    let mut pages = stage.s3.list_objects_v2().bucket(BUCKET).into_paginator().send();
    while let Some(page) = pages.next().await {
        let page = page.map_err(|error| Failure(format!("list: {error:?}")))?;
        for object in page.contents() {
            let size_bytes = object.size().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
            objects.insert(object.key().unwrap_or_default().to_owned(), Object { size_bytes, sha256: None });
        }
    }
    let read: Vec<(String, Object)> = stream::iter(objects.keys().filter(|key| pointed.contains(key.as_str())))
        .map(|key| read_again(stage, key))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    objects.extend(read);
    Ok(objects)
}

async fn read_again(stage: &Stage, key: &str) -> Result<(String, Object), Failure> {
    let failed = |error: String| Failure(format!("read {key}: {error}"));
    let answer = stage.s3.get_object().bucket(BUCKET).key(key).send().await.map_err(|error| failed(format!("{error:?}")))?;
    let (mut body, mut hasher, mut size_bytes) = (answer.body, Algorithm::Sha256.hasher(), 0);
    while let Some(piece) = body.try_next().await.map_err(|error| failed(error.to_string()))? {
        hasher.update(&piece);
        size_bytes += piece.len() as u64;
    }
    Ok((key.to_owned(), Object { size_bytes, sha256: Some(hasher.finish().hex()) }))
}

/// MinIO lists multipart uploads by exact key only, so its own directory says it: each upload has a description there.
fn leftovers(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            leftovers(&entry.path(), found);
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
    let (mut records, mut ended) = (Vec::new(), 0);
    while ended < assignment.count() {
        match consumer.poll(Duration::from_secs(30)) {
            None => return Err(Failure("Kafka gave no record and no end for 30 s".into())),
            Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
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
