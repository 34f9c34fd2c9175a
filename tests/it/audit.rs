//! The audit: it reports nothing for a consistent broker, finds each inconsistency made by hand, and `--fix` repairs what it can.

mod forged;
mod restored;

use std::process::Stdio;
use std::time::Duration;

use lfs_broker::audit::{Audit, Error, Finding, FindingKind, Report};
use lfs_broker::kafka::{Delivery, Kafka};
use lfs_broker::objects::Objects;
use lfs_broker::store::Store;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::servers::servers;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes, sha256};

/// Runs the audit like the command, with the test broker's settings.
pub(crate) async fn audit(broker: &TestBroker, fix: bool) -> Result<Report, Error> {
    let store = Store::connect(&broker.settings.store).unwrap();
    let objects = Objects::connect(&broker.settings.objects).await.unwrap();
    let kafka = Kafka::connect(&broker.settings.kafka).unwrap();
    Audit { store, objects, kafka, fix }.run().await
}

/// Asserts that the report contains exactly these kinds of findings.
#[track_caller]
fn assert_kinds(report: &Report, kinds: &[FindingKind]) {
    let kinds_found: Vec<FindingKind> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds_found, kinds, "{:#?}", report.findings);
    assert_eq!(report.clean, kinds.is_empty());
}

/// The finding's count, bytes and number of repairs.
#[track_caller]
fn figures(report: &Report, kind: FindingKind) -> (u64, u64, u64) {
    let Finding { count, bytes, fixed, .. } = report.finding(kind).unwrap_or_else(|| panic!("{:#?}", report.findings));
    (*count, *bytes, *fixed)
}

/// Runs the audit, which must find nothing. Only an error of Kafka is retried: it may answer late on a busy machine.
pub(crate) async fn assert_clean(broker: &TestBroker) {
    let mut report = audit(broker, false).await;
    for _ in 0..10 {
        if !matches!(report, Err(Error::Kafka(_))) {
            break;
        }
        report = audit(broker, false).await;
    }
    assert_kinds(&report.unwrap(), &[]);
}

fn id(response: &ApiResponse) -> Uuid {
    response.id().parse().unwrap()
}

async fn sql(broker: &TestBroker, statement: &'static str, id: Uuid) -> u64 {
    sqlx::query(statement).bind(id).execute(&broker.db).await.unwrap().rows_affected()
}

pub(crate) fn producer() -> FutureProducer {
    rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).set("linger.ms", "0").create().unwrap()
}

/// Produces a record without a value that refers to an object by the header `S3-REF-FILE-PATH`.
pub(crate) async fn produce_reference(topic: &str, key: &str) {
    let header = OwnedHeaders::new().insert(Header { key: "S3-REF-FILE-PATH", value: Some(key) });
    let record = FutureRecord::<str, [u8]>::to(topic).partition(0).headers(header);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// Produces a record without the broker.
pub(crate) async fn produce(topic: &str, partition: i32, value: &[u8], upload_id: Option<&str>) {
    let record = FutureRecord::<str, [u8]>::to(topic).partition(partition).payload(value);
    let record = match upload_id {
        Some(id) => record.headers(OwnedHeaders::new().insert(Header { key: "lfs-upload-id", value: Some(id) })),
        None => record,
    };
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// Produces a record that claims to be a verified upload's. Any producer with write access to the topic can do this.
pub(crate) async fn forge(topic: &str, partition: i32, value: &[u8], upload_id: &str) {
    let headers = OwnedHeaders::new()
        .insert(Header { key: "lfs-upload-id", value: Some(upload_id) })
        .insert(Header { key: "lfs-integrity", value: Some("sha256") });
    let record = FutureRecord::<str, [u8]>::to(topic).partition(partition).payload(value).headers(headers);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// A pointer as another producer may write it. Only its beginning is fixed by the format.
fn foreign_pointer(broker: &TestBroker, key: &str, size: usize) -> String {
    let sha256 = sha256(b"any");
    format!(r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":{size},"sha256":"{sha256}"}}"#, broker.bucket)
}

async fn object_key(broker: &TestBroker, id: Uuid) -> String {
    broker.upload(&id.to_string()).await.json["object_key"].as_str().unwrap().to_owned()
}

/// Publishes an upload, then moves its session back to `verified` and to a topic that has no record of it.
async fn verified_without_record(broker: &TestBroker, content: &[u8]) -> (Uuid, String) {
    let done = id(&broker.publish(content, json!({})).await);
    let other = format!("it-{}", Uuid::new_v4().simple());
    broker.create_topic(&other, 1).await;
    let moved = sqlx::query(
        "update upload_sessions set state = 'verified', topic = $2, verified_at = verified_at - interval '2 minutes',
             published_partition = null, published_offset = null, published_at = null where id = $1",
    );
    assert_eq!(moved.bind(done).bind(&other).execute(&broker.db).await.unwrap().rows_affected(), 1);
    (done, other)
}

#[tokio::test]
async fn the_audit_finds_nothing_wrong_after_normal_uploads() {
    let broker = TestBroker::start().await;
    broker.publish(b"one", json!({"key": "k"})).await;
    broker.publish(b"two", json!({"key": "k"})).await;
    let content = bytes(2 * PART_BYTES + 1, 1);
    let parts = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&parts.json["parts"], &content).await;
    broker.complete_and_wait(&parts.id(), json!({})).await;
    broker.open(b"still open", json!({})).await.expect(201);
    broker.open_multipart(&content, json!({})).await.expect(201);
    let aborted = broker.open_multipart(&content, json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    // Other producers and writers may use the topic and the bucket too.
    produce(&broker.topic, 0, b"inline data", None).await;
    produce(&broker.topic, 0, b"a copy of a stranger's", Some(&Uuid::now_v7().to_string())).await;
    broker.put_object("somebody/else.bin", b"x", None).await;
    broker.put_object(&format!("acme/t/lfs/2026/01/01/{}", Uuid::now_v7()), b"not through our URLs", None).await;
    let report = audit(&broker, false).await.unwrap();
    assert_kinds(&report, &[]);
    assert_eq!((report.sessions, report.objects, report.records), (6, 5, 5));
    assert_kinds(&audit(&broker, true).await.unwrap(), &[]);
}

#[tokio::test]
async fn the_audit_fix_removes_an_object_that_an_aborted_upload_left() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    broker.wait_until_s3_is_empty(opened.json["object_key"].as_str().unwrap()).await;
    // The second cleanup of the upload is still due: until then the object is no orphan.
    broker.put_object(opened.json["object_key"].as_str().unwrap(), b"late bytes", Some(&opened.id())).await;
    assert_clean(&broker).await;
    assert_eq!(sql(&broker, "update upload_sessions set cleanup_due_at = null where id = $1", id(&opened)).await, 1);

    let report = audit(&broker, false).await.unwrap();
    assert_kinds(&report, &[FindingKind::ObjectOrphan]);
    assert_eq!(figures(&report, FindingKind::ObjectOrphan), (1, 10, 0));
    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::ObjectOrphan), (1, 10, 1));
    broker.wait_until_s3_is_empty(opened.json["object_key"].as_str().unwrap()).await;
    assert_clean(&broker).await;
}

#[tokio::test]
async fn the_audit_reports_an_object_of_an_unknown_upload_and_never_removes_it() {
    let broker = TestBroker::start().await;
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2020/01/01/{stranger}", broker.topic);
    broker.put_object(&key, b"the only copy", Some(&stranger.to_string())).await;
    for fix in [false, true] {
        let report = audit(&broker, fix).await.unwrap();
        assert_kinds(&report, &[FindingKind::ObjectUnknown]);
        assert_eq!(figures(&report, FindingKind::ObjectUnknown), (1, 13, 0));
    }
    assert_eq!(broker.objects().await, [key]);
}

#[tokio::test]
async fn the_audit_fix_aborts_multipart_uploads_of_finished_sessions_only() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 1, 2);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    broker.complete_and_wait(&opened.id(), json!({})).await;
    let key = opened.json["object_key"].as_str().unwrap();
    let create = |key: String| broker.s3.create_multipart_upload().bucket(&broker.bucket).key(key).send();
    let stray = create(key.to_owned()).await.unwrap();
    let part = broker.s3.upload_part().bucket(&broker.bucket).key(key).upload_id(stray.upload_id().unwrap()).part_number(1);
    part.body(bytes(1000, 3).into()).send().await.unwrap();

    assert_kinds(&audit(&broker, false).await.unwrap(), &[FindingKind::UploadOrphan]);
    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::UploadOrphan), (1, 1000, 1));
    assert!(!broker.has_open_multipart(key).await);
    assert_clean(&broker).await;

    let unknown = format!("acme/{}/lfs/2020/01/01/{}", broker.topic, Uuid::now_v7());
    create(unknown.clone()).await.unwrap();
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::UploadUnknown]);
    // A client may be putting its parts now.
    assert_eq!(figures(&report, FindingKind::UploadUnknown), (1, 0, 0));
    assert!(broker.has_open_multipart(&unknown).await);
}

#[tokio::test]
async fn the_audit_finds_published_objects_that_are_missing_or_replaced() {
    let broker = TestBroker::start().await;
    let gone = id(&broker.publish(b"gone", json!({})).await);
    let longer = id(&broker.publish(b"longer", json!({})).await);
    let foreign = id(&broker.publish(b"foreign", json!({})).await);
    broker.s3.delete_object().bucket(&broker.bucket).key(object_key(&broker, gone).await).send().await.unwrap();
    broker.put_object(&object_key(&broker, longer).await, b"longer than it was", Some(&longer.to_string())).await;
    broker.put_object(&object_key(&broker, foreign).await, b"foreign", Some("somebody")).await;
    for fix in [false, true] {
        let report = audit(&broker, fix).await.unwrap();
        assert_kinds(&report, &[FindingKind::ObjectMissing, FindingKind::ObjectMismatch]);
        assert_eq!(figures(&report, FindingKind::ObjectMissing), (1, 4, 0));
        assert_eq!(figures(&report, FindingKind::ObjectMismatch), (2, 13, 0));
        assert!(report.finding(FindingKind::ObjectMissing).unwrap().examples[0].contains(&gone.to_string()));
    }
}

#[tokio::test]
async fn the_audit_fix_requeues_a_pointer_that_is_missing_in_the_outbox() {
    let broker = TestBroker::start().await;
    let (upload, topic) = verified_without_record(&broker, b"forgotten").await;
    let report = audit(&broker, false).await.unwrap();
    assert_kinds(&report, &[FindingKind::OutboxMissing]);
    assert_eq!(figures(&report, FindingKind::OutboxMissing), (1, 9, 0));
    assert!(broker.records(&topic).await.is_empty());

    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::OutboxMissing), (1, 9, 1));
    let published = broker.wait_for_state(&upload.to_string(), "published").await;
    let records = broker.records(&topic).await;
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].json(), published.json["pointer"]);
    assert_eq!(records[0].header("lfs-upload-id"), Some(upload.to_string().as_str()));
    assert_clean(&broker).await;
}

#[tokio::test]
async fn the_audit_reports_a_long_deferred_pointer_with_its_reason() {
    let broker = TestBroker::start().await;
    let (upload, _) = verified_without_record(&broker, b"parked").await;
    let deferred = "insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
         select id, 0, topic, pointer, '[]', verified_at, now() + interval '1 hour', 'the topic is on fire'
         from upload_sessions where id = $1";
    assert_eq!(sql(&broker, deferred, upload).await, 1);
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::Unpublished]);
    assert_eq!(figures(&report, FindingKind::Unpublished), (1, 6, 0));
    assert!(report.findings[0].examples[0].contains("the topic is on fire"), "{:?}", report.findings);
}

#[tokio::test]
async fn the_audit_fix_removes_the_outbox_row_of_a_pointer_that_is_published_already() {
    let broker = TestBroker::start().await;
    let done = id(&broker.publish(b"once", json!({})).await);
    let again = "insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
         select id, 0, topic, pointer, '[]', now(), now() + interval '1 hour', 'refused' from upload_sessions where id = $1";
    assert_eq!(sql(&broker, again, done).await, 1);
    assert_eq!(figures(&audit(&broker, false).await.unwrap(), FindingKind::OutboxStray), (1, 4, 0));
    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::OutboxStray), (1, 4, 1));
    assert_clean(&broker).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn the_audit_finds_sessions_whose_record_position_or_value_is_wrong() {
    let broker = TestBroker::start().await;
    let mut done = Vec::new();
    for content in [b"1st", b"2nd", b"3rd", b"4th"] {
        done.push(id(&broker.publish(content, json!({"partition": 0})).await));
    }
    assert_clean(&broker).await;
    // The second session gets the third's offset, the third an offset that never existed, and the fourth another pointer.
    let moved = sqlx::query(
        "update upload_sessions s set published_offset = t.published_offset from upload_sessions t where s.id = $1 and t.id = $2",
    );
    moved.bind(done[1]).bind(done[2]).execute(&broker.db).await.unwrap();
    sql(&broker, "update upload_sessions set published_offset = published_offset + 1000 where id = $1", done[2]).await;
    sql(&broker, "update upload_sessions set pointer = pointer || ' ' where id = $1", done[3]).await;
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::RecordMissing, FindingKind::RecordMismatch, FindingKind::RecordDuplicate]);
    assert_eq!(figures(&report, FindingKind::RecordMissing), (1, 3, 0));
    assert_eq!(figures(&report, FindingKind::RecordMismatch), (2, 6, 0));
    // No session names the offsets of the second and the third record.
    assert_eq!(figures(&report, FindingKind::RecordDuplicate), (2, 6, 0));
}

#[tokio::test]
async fn the_audit_finds_a_record_that_is_missing_in_the_middle_of_the_log() {
    let broker = TestBroker::start().await;
    let done = id(&broker.publish(b"at the front", json!({"partition": 1})).await);
    // Inline records follow, so that the changed offset is inside the log.
    produce(&broker.topic, 1, b"inline data", None).await;
    produce(&broker.topic, 1, b"inline data", None).await;
    sql(&broker, "update upload_sessions set published_offset = published_offset + 2 where id = $1", done).await;
    let report = audit(&broker, false).await.unwrap();
    // With transactions the commit marker has an offset too: at the changed offset is an inline record or a marker.
    assert_eq!(figures(&report, FindingKind::RecordMissing), (1, 12, 0));
    assert_eq!(figures(&report, FindingKind::RecordDuplicate), (1, 12, 0));
}

#[tokio::test]
async fn the_audit_finds_duplicate_unknown_and_undeclared_records() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"twice", json!({})).await;
    let pointer = broker.only_record().await.0.value;
    produce(&broker.topic, 2, &pointer, Some(&done.id())).await;
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::RecordDuplicate]);
    assert_eq!(figures(&report, FindingKind::RecordDuplicate), (1, 5, 0));

    let aborted = broker.open(b"taken back", json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    produce(&broker.topic, 2, b"whatever it says", Some(&aborted.id())).await;
    // A pointer to an open upload, by a producer that cannot know the bytes: the object does not exist.
    let open = broker.open(b"not put", json!({})).await.expect(201);
    let claimed = foreign_pointer(&broker, open.json["object_key"].as_str().unwrap(), 7);
    produce(&broker.topic, 2, claimed.as_bytes(), Some(&open.id())).await;
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2026/01/01/{stranger}", broker.topic);
    produce(&broker.topic, 2, foreign_pointer(&broker, &key, 3).as_bytes(), Some(&stranger.to_string())).await;
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::RecordDuplicate, FindingKind::RecordUnknown, FindingKind::RecordUnpromised]);
    assert_eq!(figures(&report, FindingKind::RecordUnknown), (1, 3, 0));
    assert_eq!(figures(&report, FindingKind::RecordUnpromised), (2, 17, 0));
    assert_eq!(broker.upload(&open.id()).await.state(), "open");
}

#[tokio::test]
async fn the_audit_counts_more_than_one_page_of_sessions_and_records() {
    let broker = TestBroker::start().await;
    broker.publish(b"one", json!({"key": "k"})).await;
    let aborted = broker.open(b"many", json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    let copies = "insert into upload_sessions
         select (jsonb_populate_record(s, jsonb_build_object(
             'id', gen_random_uuid(), 'object_key', s.object_key || n, 'bytes_held_until', null))).*
         from upload_sessions s, generate_series(1, 2100) n where s.id = $1";
    assert_eq!(sql(&broker, copies, id(&aborted)).await, 2100);
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2026/01/01/{stranger}", broker.topic);
    let pointer = foreign_pointer(&broker, &key, 2);
    let producer: FutureProducer = rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().unwrap();
    let headers = OwnedHeaders::new().insert(Header { key: "lfs-upload-id", value: Some(&stranger.to_string()) });
    let record = || FutureRecord::<str, str>::to(&broker.topic).partition(0).payload(&pointer).headers(headers.clone());
    let sent: Vec<_> = (0..2500).map(|_| producer.send_result(record()).unwrap_or_else(|(error, _)| panic!("{error}"))).collect();
    for sent in sent {
        sent.await.unwrap().unwrap();
    }
    let report = audit(&broker, false).await.unwrap();
    assert_kinds(&report, &[FindingKind::RecordUnknown]);
    assert_eq!(figures(&report, FindingKind::RecordUnknown), (2500, 5000, 0));
    assert_eq!(report.findings[0].examples.len(), 20);
    assert_eq!((report.sessions, report.records), (2102, 2501));
}

#[tokio::test]
async fn the_audit_fix_recounts_quotas() {
    let broker = TestBroker::start().await;
    broker.open(b"12345", json!({})).await.expect(201);
    sqlx::query("update tenants set open_sessions = 7, reserved_bytes = 105").execute(&broker.db).await.unwrap();
    sqlx::query("insert into tenants values ('ghost', 1, 10)").execute(&broker.db).await.unwrap();
    assert_eq!(figures(&audit(&broker, false).await.unwrap(), FindingKind::Quota), (2, 110, 0));
    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::Quota), (2, 110, 2));
    assert_clean(&broker).await;
    let usage: Vec<(String, i64, i64)> = sqlx::query_as("select tenant, open_sessions, reserved_bytes from tenants order by 1")
        .fetch_all(&broker.db)
        .await
        .unwrap();
    assert_eq!(usage, [("default".to_owned(), 1, 5), ("ghost".to_owned(), 0, 0)]);
}

#[tokio::test]
async fn the_audit_names_a_corrupt_row_and_continues() {
    let broker = TestBroker::start().await;
    let broken = broker.open(b"broken", json!({})).await.expect(201);
    sql(&broker, r#"update upload_sessions set record_headers = '{"a": 1}' where id = $1"#, id(&broken)).await;
    let gone = id(&broker.publish(b"gone", json!({})).await);
    broker.s3.delete_object().bucket(&broker.bucket).key(object_key(&broker, gone).await).send().await.unwrap();
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::Corrupt, FindingKind::ObjectMissing]);
    assert!(report.findings[0].examples[0].contains(&broken.id()));
}

#[tokio::test]
async fn the_audit_fails_when_a_dependency_does_not_answer() {
    let mut broker = TestBroker::start().await;
    broker.publish(b"one", json!({})).await;
    let original = broker.settings.clone();
    broker.settings.kafka.bootstrap_servers = "127.0.0.1:1".into();
    assert!(matches!(audit(&broker, false).await, Err(Error::Kafka(_))));
    broker.settings = original.clone();
    broker.settings.objects.endpoint = Some("http://127.0.0.1:1".into());
    assert!(matches!(audit(&broker, false).await, Err(Error::Objects(_))));
    broker.settings = original.clone();
    broker.settings.store.url = "postgres://u:p@127.0.0.1:1/x".into();
    assert!(matches!(audit(&broker, false).await, Err(Error::Store(_))));
    broker.settings = original;
    assert_clean(&broker).await;
}

#[tokio::test]
async fn the_audit_command_reports_its_result_by_its_exit_code() {
    let broker = TestBroker::start().await;
    broker.publish(b"one", json!({})).await;
    let settings = broker.settings.clone();
    let run = async |arguments: &[&str], kafka: &str| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
        command.arg("audit").args(arguments).env_clear().stdin(Stdio::null());
        command.env("DATABASE_URL", &settings.store.url).env("KAFKA_BOOTSTRAP_SERVERS", kafka);
        command.env("AWS_ENDPOINT_URL_S3", settings.objects.endpoint.clone().unwrap());
        command.env("AWS_ACCESS_KEY_ID", settings.objects.access_key_id.clone().unwrap());
        command.env("AWS_SECRET_ACCESS_KEY", settings.objects.secret_access_key.clone().unwrap());
        command.env("AWS_REGION", "us-east-1").env("LFS_BROKER_S3_BUCKET", &broker.bucket);
        let delivery = if settings.kafka.delivery == Delivery::ExactlyOnce { "exactly_once" } else { "at_least_once" };
        command.env("LFS_BROKER_DELIVERY", delivery).env("LFS_BROKER_AUTH_MODE", "none");
        let output = command.output().await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let kafka = &broker.settings.kafka.bootstrap_servers;
    let (code, stdout, stderr) = run(&[], kafka).await;
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert_eq!(stdout, "checked 1 uploads, 1 objects, 1 records\nPostgreSQL, S3 and Kafka agree\n");

    sqlx::query("update tenants set open_sessions = 7").execute(&broker.db).await.unwrap();
    let (code, stdout, stderr) = run(&["--json"], kafka).await;
    assert_eq!((code, stderr.as_str()), (1, "error: 1 findings\n"));
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&report["clean"], report["findings"].as_array().unwrap().len()), (&json!(false), 1));
    let finding = &report["findings"][0];
    assert_eq!(finding["kind"], "quota");
    assert_eq!((&finding["count"], &finding["fixed"]), (&json!(1), &json!(0)));
    assert_eq!(run(&["--fix"], kafka).await.0, 1);
    assert_eq!(run(&["--json"], kafka).await.0, 0);

    let (code, stdout, stderr) = run(&["--json"], "127.0.0.1:1").await;
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.starts_with("error: could not check: kafka"), "{stderr}");
}

#[tokio::test]
async fn the_audit_also_scans_buckets_that_only_sessions_name() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({})).await;
    let key = format!("acme/{}/lfs/2020/01/01/{}", broker.topic, Uuid::now_v7());
    broker.put_object(&key, b"nobody's", None).await;
    let mut settings = broker.settings.objects.clone();
    settings.bucket = None;
    let store = Store::connect(&broker.settings.store).unwrap();
    let kafka = Kafka::connect(&broker.settings.kafka).unwrap();
    let objects = Objects::connect(&settings).await.unwrap();
    let audit = Audit { store, objects, kafka, fix: false };
    assert_eq!(audit.run().await.unwrap().objects, 2, "no bucket is set, and no policy names one");

    // A deleted bucket has no objects: the audit reports the published object as missing.
    let moved = "update upload_sessions set bucket = 'it-is-not-there' where id = $1";
    assert_eq!(sql(&broker, moved, id(&done)).await, 1);
    let report = audit.run().await.unwrap();
    assert_eq!((report.objects, figures(&report, FindingKind::ObjectMissing).0), (0, 1));
}
