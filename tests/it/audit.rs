//! The audit: a clean house is clean, each kind of disagreement made by hand is found, and `fix` heals what it says.

mod forged;
mod restored;

use std::process::Stdio;
use std::time::Duration;

use lfs_broker::audit::{Audit, Error, Finding, Kind, Report};
use lfs_broker::kafka::{Delivery, Kafka};
use lfs_broker::objects::Objects;
use lfs_broker::store::Store;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::servers::servers;
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes, sha256};

/// The audit as the command runs it, on the house's settings.
pub(crate) async fn audit(house: &House, fix: bool) -> Result<Report, Error> {
    let store = Store::connect(&house.settings.store).unwrap();
    let objects = Objects::connect(&house.settings.objects).await.unwrap();
    let kafka = Kafka::connect(&house.settings.kafka).unwrap();
    Audit { store, objects, kafka, fix }.run().await
}

/// Runs the audit, which must find exactly these kinds.
#[track_caller]
fn found(report: &Report, kinds: &[Kind]) {
    let told: Vec<Kind> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(told, kinds, "{:#?}", report.findings);
    assert_eq!(report.clean, kinds.is_empty());
}

/// A finding's count, bytes and repairs.
#[track_caller]
fn figures(report: &Report, kind: Kind) -> (u64, u64, u64) {
    let Finding { count, bytes, fixed, .. } = report.finding(kind).unwrap_or_else(|| panic!("{:#?}", report.findings));
    (*count, *bytes, *fixed)
}

/// Runs the audit, which must find nothing. Only an error of Kafka is retried: it may answer late on a busy machine.
pub(crate) async fn is_clean(house: &House) {
    let mut report = audit(house, false).await;
    for _ in 0..10 {
        if !matches!(report, Err(Error::Kafka(_))) {
            break;
        }
        report = audit(house, false).await;
    }
    found(&report.unwrap(), &[]);
}

fn id(answer: &Answer) -> Uuid {
    answer.id().parse().unwrap()
}

async fn sql(house: &House, statement: &'static str, id: Uuid) -> u64 {
    sqlx::query(statement).bind(id).execute(&house.db).await.unwrap().rows_affected()
}

fn producer() -> FutureProducer {
    rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).set("linger.ms", "0").create().unwrap()
}

/// Puts a record into a topic that refers to an object the other way of the field: by a header, without a value.
pub(crate) async fn refer(topic: &str, key: &str) {
    let header = OwnedHeaders::new().insert(Header { key: "S3-REF-FILE-PATH", value: Some(key) });
    let record = FutureRecord::<str, [u8]>::to(topic).partition(0).headers(header);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// Puts a record into a topic past the broker.
pub(crate) async fn produce(topic: &str, partition: i32, value: &[u8], upload_id: Option<&str>) {
    let record = FutureRecord::<str, [u8]>::to(topic).partition(partition).payload(value);
    let record = match upload_id {
        Some(id) => record.headers(OwnedHeaders::new().insert(Header { key: "lfs-upload-id", value: Some(id) })),
        None => record,
    };
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// Puts a record into a topic that claims to be an upload's, proved whole, as whoever may write to the topic can.
pub(crate) async fn forge(topic: &str, partition: i32, value: &[u8], upload_id: &str) {
    let headers = OwnedHeaders::new()
        .insert(Header { key: "lfs-upload-id", value: Some(upload_id) })
        .insert(Header { key: "lfs-integrity", value: Some("sha256") });
    let record = FutureRecord::<str, [u8]>::to(topic).partition(partition).payload(value).headers(headers);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
}

/// A pointer as somebody else may write it: only its beginning is a rule.
fn written(house: &House, key: &str, size: usize) -> String {
    let sha256 = sha256(b"any");
    format!(r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":{size},"sha256":"{sha256}"}}"#, house.bucket)
}

async fn object_key(house: &House, id: Uuid) -> String {
    house.upload(&id.to_string()).await.json["object_key"].as_str().unwrap().to_owned()
}

/// An upload that is verified and waits for a topic where its record is not.
async fn waiting_elsewhere(house: &House, content: &[u8]) -> (Uuid, String) {
    let done = id(&house.publish(content, json!({})).await);
    let other = format!("it-{}", Uuid::new_v4().simple());
    house.make_topic(&other, 1).await;
    let moved = sqlx::query(
        "update upload_sessions set state = 'verified', topic = $2, verified_at = verified_at - interval '2 minutes',
             published_partition = null, published_offset = null, published_at = null where id = $1",
    );
    assert_eq!(moved.bind(done).bind(&other).execute(&house.db).await.unwrap().rows_affected(), 1);
    (done, other)
}

#[tokio::test]
async fn a_clean_house_is_clean_whatever_its_uploads_came_to() {
    let house = House::new().await;
    house.publish(b"one", json!({"key": "k"})).await;
    house.publish(b"two", json!({"key": "k"})).await;
    let content = bytes(2 * PART + 1, 1);
    let parts = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&parts.json["parts"], &content).await;
    house.complete_and_wait(&parts.id(), json!({})).await;
    house.open(b"still open", json!({})).await.expect(201);
    house.open_parts(&content, json!({})).await.expect(201);
    let aborted = house.open_parts(&content, json!({})).await.expect(201);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    // Others may use the topic and the bucket too.
    produce(&house.topic, 0, b"inline data", None).await;
    produce(&house.topic, 0, b"a copy of a stranger's", Some(&Uuid::now_v7().to_string())).await;
    house.put_object("somebody/else.bin", b"x", None).await;
    house.put_object(&format!("acme/t/lfs/2026/01/01/{}", Uuid::now_v7()), b"not through our URLs", None).await;
    let report = audit(&house, false).await.unwrap();
    found(&report, &[]);
    assert_eq!((report.sessions, report.objects, report.records), (6, 5, 5));
    found(&audit(&house, true).await.unwrap(), &[]);
}

#[tokio::test]
async fn an_object_that_a_failed_upload_left_is_handed_to_the_sweeper() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    house.until_nothing_is_left(opened.json["object_key"].as_str().unwrap()).await;
    // The second pass is still due: what appears before it is no orphan.
    house.put_object(opened.json["object_key"].as_str().unwrap(), b"late bytes", Some(&opened.id())).await;
    is_clean(&house).await;
    assert_eq!(sql(&house, "update upload_sessions set cleanup_due_at = null where id = $1", id(&opened)).await, 1);

    let told = audit(&house, false).await.unwrap();
    found(&told, &[Kind::ObjectOrphan]);
    assert_eq!(figures(&told, Kind::ObjectOrphan), (1, 10, 0));
    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::ObjectOrphan), (1, 10, 1));
    house.until_nothing_is_left(opened.json["object_key"].as_str().unwrap()).await;
    is_clean(&house).await;
}

#[tokio::test]
async fn an_object_whose_upload_is_unknown_is_told_and_never_removed() {
    let house = House::new().await;
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2020/01/01/{stranger}", house.topic);
    house.put_object(&key, b"the only copy", Some(&stranger.to_string())).await;
    for fix in [false, true] {
        let report = audit(&house, fix).await.unwrap();
        found(&report, &[Kind::ObjectUnknown]);
        assert_eq!(figures(&report, Kind::ObjectUnknown), (1, 13, 0));
    }
    assert_eq!(house.objects().await, [key]);
}

#[tokio::test]
async fn multipart_uploads_that_nobody_will_complete_are_aborted() {
    let house = House::new().await;
    let content = bytes(PART + 1, 2);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    house.complete_and_wait(&opened.id(), json!({})).await;
    let key = opened.json["object_key"].as_str().unwrap();
    let begin = |key: String| house.s3.create_multipart_upload().bucket(&house.bucket).key(key).send();
    let left = begin(key.to_owned()).await.unwrap();
    let part = house.s3.upload_part().bucket(&house.bucket).key(key).upload_id(left.upload_id().unwrap()).part_number(1);
    part.body(bytes(1000, 3).into()).send().await.unwrap();

    found(&audit(&house, false).await.unwrap(), &[Kind::UploadOrphan]);
    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::UploadOrphan), (1, 1000, 1));
    assert!(!house.has_open_multipart(key).await);
    is_clean(&house).await;

    let nobodys = format!("acme/{}/lfs/2020/01/01/{}", house.topic, Uuid::now_v7());
    begin(nobodys.clone()).await.unwrap();
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::UploadUnknown]);
    // Somebody may be putting its parts now.
    assert_eq!(figures(&report, Kind::UploadUnknown), (1, 0, 0));
    assert!(house.has_open_multipart(&nobodys).await);
}

#[tokio::test]
async fn promised_objects_that_are_gone_or_others_are_found() {
    let house = House::new().await;
    let gone = id(&house.publish(b"gone", json!({})).await);
    let longer = id(&house.publish(b"longer", json!({})).await);
    let foreign = id(&house.publish(b"foreign", json!({})).await);
    house.s3.delete_object().bucket(&house.bucket).key(object_key(&house, gone).await).send().await.unwrap();
    house.put_object(&object_key(&house, longer).await, b"longer than it was", Some(&longer.to_string())).await;
    house.put_object(&object_key(&house, foreign).await, b"foreign", Some("somebody")).await;
    for fix in [false, true] {
        let report = audit(&house, fix).await.unwrap();
        found(&report, &[Kind::ObjectMissing, Kind::ObjectMismatch]);
        assert_eq!(figures(&report, Kind::ObjectMissing), (1, 4, 0));
        assert_eq!(figures(&report, Kind::ObjectMismatch), (2, 13, 0));
        assert!(report.finding(Kind::ObjectMissing).unwrap().examples[0].contains(&gone.to_string()));
    }
}

#[tokio::test]
async fn a_promise_that_nothing_would_keep_is_promised_again() {
    let house = House::new().await;
    let (upload, topic) = waiting_elsewhere(&house, b"forgotten").await;
    let report = audit(&house, false).await.unwrap();
    found(&report, &[Kind::OutboxMissing]);
    assert_eq!(figures(&report, Kind::OutboxMissing), (1, 9, 0));
    assert!(house.records(&topic).await.is_empty());

    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::OutboxMissing), (1, 9, 1));
    let published = house.until(&upload.to_string(), "published").await;
    let records = house.records(&topic).await;
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].json(), published.json["pointer"]);
    assert_eq!(records[0].header("lfs-upload-id"), Some(upload.to_string().as_str()));
    is_clean(&house).await;
}

#[tokio::test]
async fn a_pointer_that_waits_too_long_is_told_with_its_reason() {
    let house = House::new().await;
    let (upload, _) = waiting_elsewhere(&house, b"parked").await;
    let parked = "insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
         select id, 0, topic, pointer, '[]', verified_at, now() + interval '1 hour', 'the topic is on fire'
         from upload_sessions where id = $1";
    assert_eq!(sql(&house, parked, upload).await, 1);
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::Unpublished]);
    assert_eq!(figures(&report, Kind::Unpublished), (1, 6, 0));
    assert!(report.findings[0].examples[0].contains("the topic is on fire"), "{:?}", report.findings);
}

#[tokio::test]
async fn a_pointer_that_would_be_sent_twice_is_taken_out_of_the_outbox() {
    let house = House::new().await;
    let done = id(&house.publish(b"once", json!({})).await);
    let again = "insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
         select id, 0, topic, pointer, '[]', now(), now() + interval '1 hour', 'refused' from upload_sessions where id = $1";
    assert_eq!(sql(&house, again, done).await, 1);
    assert_eq!(figures(&audit(&house, false).await.unwrap(), Kind::OutboxStray), (1, 4, 0));
    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::OutboxStray), (1, 4, 1));
    is_clean(&house).await;
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn records_and_sessions_that_do_not_meet_are_found() {
    let house = House::new().await;
    let mut done = Vec::new();
    for content in [b"1st", b"2nd", b"3rd", b"4th"] {
        done.push(id(&house.publish(content, json!({"partition": 0})).await));
    }
    is_clean(&house).await;
    // The second is said to be where the third is, the third where nothing ever was, the fourth to be another.
    let moved = sqlx::query(
        "update upload_sessions s set published_offset = t.published_offset from upload_sessions t where s.id = $1 and t.id = $2",
    );
    moved.bind(done[1]).bind(done[2]).execute(&house.db).await.unwrap();
    sql(&house, "update upload_sessions set published_offset = published_offset + 1000 where id = $1", done[2]).await;
    sql(&house, "update upload_sessions set pointer = pointer || ' ' where id = $1", done[3]).await;
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::RecordMissing, Kind::RecordMismatch, Kind::RecordDuplicate]);
    assert_eq!(figures(&report, Kind::RecordMissing), (1, 3, 0));
    assert_eq!(figures(&report, Kind::RecordMismatch), (2, 6, 0));
    // The records of the second and the third are where no session says they are.
    assert_eq!(figures(&report, Kind::RecordDuplicate), (2, 6, 0));
}

#[tokio::test]
async fn a_record_that_is_missing_in_the_middle_of_the_log_is_found() {
    let house = House::new().await;
    let done = id(&house.publish(b"at the front", json!({"partition": 1})).await);
    // An inline record is between; the session's own goes for one of another topic.
    produce(&house.topic, 1, b"inline data", None).await;
    produce(&house.topic, 1, b"inline data", None).await;
    sql(&house, "update upload_sessions set published_offset = published_offset + 2 where id = $1", done).await;
    let report = audit(&house, false).await.unwrap();
    // With transactions the commit has an offset of its own, so what is there may be one of either kind: not ours.
    assert_eq!(figures(&report, Kind::RecordMissing), (1, 12, 0));
    assert_eq!(figures(&report, Kind::RecordDuplicate), (1, 12, 0));
}

#[tokio::test]
async fn second_records_unknown_ones_and_unpromised_ones_are_found() {
    let house = House::new().await;
    let done = house.publish(b"twice", json!({})).await;
    let pointer = house.only_record().await.0.value;
    produce(&house.topic, 2, &pointer, Some(&done.id())).await;
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::RecordDuplicate]);
    assert_eq!(figures(&report, Kind::RecordDuplicate), (1, 5, 0));

    let aborted = house.open(b"taken back", json!({})).await.expect(201);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    produce(&house.topic, 2, b"whatever it says", Some(&aborted.id())).await;
    // A pointer to what is still open, by somebody who cannot know what the bytes are: there is no object.
    let open = house.open(b"not put", json!({})).await.expect(201);
    let claimed = written(&house, open.json["object_key"].as_str().unwrap(), 7);
    produce(&house.topic, 2, claimed.as_bytes(), Some(&open.id())).await;
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2026/01/01/{stranger}", house.topic);
    produce(&house.topic, 2, written(&house, &key, 3).as_bytes(), Some(&stranger.to_string())).await;
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::RecordDuplicate, Kind::RecordUnknown, Kind::RecordUnpromised]);
    assert_eq!(figures(&report, Kind::RecordUnknown), (1, 3, 0));
    assert_eq!(figures(&report, Kind::RecordUnpromised), (2, 17, 0));
    assert_eq!(house.upload(&open.id()).await.state(), "open");
}

#[tokio::test]
async fn more_than_a_page_of_everything_is_counted_to_the_end() {
    let house = House::new().await;
    house.publish(b"one", json!({"key": "k"})).await;
    let aborted = house.open(b"many", json!({})).await.expect(201);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    let copies = "insert into upload_sessions
         select (jsonb_populate_record(s, jsonb_build_object(
             'id', gen_random_uuid(), 'object_key', s.object_key || n, 'bytes_held_until', null))).*
         from upload_sessions s, generate_series(1, 2100) n where s.id = $1";
    assert_eq!(sql(&house, copies, id(&aborted)).await, 2100);
    let stranger = Uuid::now_v7();
    let key = format!("acme/{}/lfs/2026/01/01/{stranger}", house.topic);
    let pointer = written(&house, &key, 2);
    let producer: FutureProducer = rdkafka::ClientConfig::new().set("bootstrap.servers", &servers().kafka).create().unwrap();
    let headers = OwnedHeaders::new().insert(Header { key: "lfs-upload-id", value: Some(&stranger.to_string()) });
    let record = || FutureRecord::<str, str>::to(&house.topic).partition(0).payload(&pointer).headers(headers.clone());
    let sent: Vec<_> = (0..2500).map(|_| producer.send_result(record()).unwrap_or_else(|(error, _)| panic!("{error}"))).collect();
    for sent in sent {
        sent.await.unwrap().unwrap();
    }
    let report = audit(&house, false).await.unwrap();
    found(&report, &[Kind::RecordUnknown]);
    assert_eq!(figures(&report, Kind::RecordUnknown), (2500, 5000, 0));
    assert_eq!(report.findings[0].examples.len(), 20);
    assert_eq!((report.sessions, report.records), (2102, 2501));
}

#[tokio::test]
async fn quotas_are_counted_again() {
    let house = House::new().await;
    house.open(b"12345", json!({})).await.expect(201);
    sqlx::query("update tenants set open_sessions = 7, reserved_bytes = 105").execute(&house.db).await.unwrap();
    sqlx::query("insert into tenants values ('ghost', 1, 10)").execute(&house.db).await.unwrap();
    assert_eq!(figures(&audit(&house, false).await.unwrap(), Kind::Quota), (2, 110, 0));
    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::Quota), (2, 110, 2));
    is_clean(&house).await;
    let held: Vec<(String, i64, i64)> = sqlx::query_as("select tenant, open_sessions, reserved_bytes from tenants order by 1")
        .fetch_all(&house.db)
        .await
        .unwrap();
    assert_eq!(held, [("default".to_owned(), 1, 5), ("ghost".to_owned(), 0, 0)]);
}

#[tokio::test]
async fn a_row_that_breaks_its_rules_is_named_and_stops_nothing() {
    let house = House::new().await;
    let broken = house.open(b"broken", json!({})).await.expect(201);
    sql(&house, r#"update upload_sessions set record_headers = '{"a": 1}' where id = $1"#, id(&broken)).await;
    let gone = id(&house.publish(b"gone", json!({})).await);
    house.s3.delete_object().bucket(&house.bucket).key(object_key(&house, gone).await).send().await.unwrap();
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::Corrupt, Kind::ObjectMissing]);
    assert!(report.findings[0].examples[0].contains(&broken.id()));
}

#[tokio::test]
async fn what_does_not_answer_leaves_nothing_known() {
    let mut house = House::new().await;
    house.publish(b"one", json!({})).await;
    let sound = house.settings.clone();
    house.settings.kafka.bootstrap_servers = "127.0.0.1:1".into();
    assert!(matches!(audit(&house, false).await, Err(Error::Kafka(_))));
    house.settings = sound.clone();
    house.settings.objects.endpoint = Some("http://127.0.0.1:1".into());
    assert!(matches!(audit(&house, false).await, Err(Error::Objects(_))));
    house.settings = sound.clone();
    house.settings.store.url = "postgres://u:p@127.0.0.1:1/x".into();
    assert!(matches!(audit(&house, false).await, Err(Error::Store(_))));
    house.settings = sound;
    is_clean(&house).await;
}

#[tokio::test]
async fn the_command_tells_by_its_exit_code() {
    let house = House::new().await;
    house.publish(b"one", json!({})).await;
    let settings = house.settings.clone();
    let run = async |arguments: &[&str], kafka: &str| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
        command.arg("audit").args(arguments).env_clear().stdin(Stdio::null());
        command.env("DATABASE_URL", &settings.store.url).env("KAFKA_BOOTSTRAP_SERVERS", kafka);
        command.env("AWS_ENDPOINT_URL_S3", settings.objects.endpoint.clone().unwrap());
        command.env("AWS_ACCESS_KEY_ID", settings.objects.access_key_id.clone().unwrap());
        command.env("AWS_SECRET_ACCESS_KEY", settings.objects.secret_access_key.clone().unwrap());
        command.env("AWS_REGION", "us-east-1").env("LFS_BROKER_S3_BUCKET", &house.bucket);
        let delivery = if settings.kafka.delivery == Delivery::ExactlyOnce { "exactly_once" } else { "at_least_once" };
        command.env("LFS_BROKER_DELIVERY", delivery).env("LFS_BROKER_AUTH_MODE", "none");
        let output = command.output().await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let kafka = &house.settings.kafka.bootstrap_servers;
    let (code, told, talk) = run(&[], kafka).await;
    assert_eq!((code, talk.as_str()), (0, ""), "{told}");
    assert_eq!(told, "looked at 1 sessions, 1 objects, 1 records\nthey tell the same story\n");

    sqlx::query("update tenants set open_sessions = 7").execute(&house.db).await.unwrap();
    let (code, told, talk) = run(&["--json"], kafka).await;
    assert_eq!((code, talk.as_str()), (1, "error: 1 findings\n"));
    let report: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&report["clean"], report["findings"].as_array().unwrap().len()), (&json!(false), 1));
    let finding = &report["findings"][0];
    assert_eq!(finding["kind"], "quota");
    assert_eq!((&finding["count"], &finding["fixed"]), (&json!(1), &json!(0)));
    assert_eq!(run(&["--fix"], kafka).await.0, 1);
    assert_eq!(run(&["--json"], kafka).await.0, 0);

    let (code, told, talk) = run(&["--json"], "127.0.0.1:1").await;
    assert_eq!((code, told.as_str()), (2, ""));
    assert!(talk.starts_with("error: could not check: kafka"), "{talk}");
}

#[tokio::test]
async fn a_bucket_that_only_the_sessions_name_is_looked_into() {
    let house = House::new().await;
    let done = house.publish(b"hello", json!({})).await;
    let key = format!("acme/{}/lfs/2020/01/01/{}", house.topic, Uuid::now_v7());
    house.put_object(&key, b"nobody's", None).await;
    let mut settings = house.settings.objects.clone();
    settings.bucket = None;
    let store = Store::connect(&house.settings.store).unwrap();
    let kafka = Kafka::connect(&house.settings.kafka).unwrap();
    let objects = Objects::connect(&settings).await.unwrap();
    let audit = Audit { store, objects, kafka, fix: false };
    assert_eq!(audit.run().await.unwrap().objects, 2, "no bucket is set, and no policy names one");

    // One that is gone has nothing in it: what was promised there is told as missing.
    let moved = "update upload_sessions set bucket = 'it-is-not-there' where id = $1";
    assert_eq!(sql(&house, moved, id(&done)).await, 1);
    let report = audit.run().await.unwrap();
    assert_eq!((report.objects, figures(&report, Kind::ObjectMissing).0), (0, 1));
}
