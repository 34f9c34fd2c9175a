//! PostgreSQL loses commits under a running broker: a backup is restored, or a standby without the last commits is
//! promoted. The relay still holds the shards, and the lease rows are unchanged.

use lfs_broker::app;
use lfs_broker::audit::FindingKind;
use serde_json::json;

use crate::audit::{assert_clean, audit};
use crate::harness::faults::{retry_while_unavailable, upload_id_of};
use crate::harness::process::BrokerProcess;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes};

/// What the relay logs when it notices the loss.
const NOTICED: &str = "is paused until it is compared with Kafka";

/// Moves uploads back to `open`.
const REOPENED: &str = "update upload_sessions set state = 'open', verified_at = null, integrity = null, pointer = null,
    object_etag = null, object_version_id = null, published_partition = null, published_offset = null, published_at = null";
const RESERVED: &str = "update tenants set open_sessions = open_sessions + 1, reserved_bytes = reserved_bytes + back.size_bytes
    from back where tenants.tenant = back.tenant";

/// What else the database lost with the publication.
#[derive(Clone, Copy)]
struct LostCommits {
    claimed_batch: bool,
}

/// A test broker that runs as a process, so that the test can read its log.
async fn start_process(environment: &[(&str, &str)]) -> (TestBroker, BrokerProcess) {
    let mut broker = TestBroker::start().await;
    broker.log_outbox_inserts().await;
    broker.stop().await;
    let process = broker.spawn_process(environment).await;
    (broker, process)
}

/// Opens an upload and puts its bytes.
async fn put(broker: &TestBroker, process: &BrokerProcess, content: &[u8]) -> String {
    let body = json!({"topic": broker.topic, "size": content.len(), "sha256": crate::harness::sha256(content), "key": "k"});
    let open = || broker.http.post(format!("{}/lfs/uploads", process.url())).json(&body);
    let opened = retry_while_unavailable(async || broker.send(open()).await).await.expect(201);
    broker.put(&opened.json["upload"], content).await.expect(200);
    opened.id()
}

async fn complete(broker: &TestBroker, process: &BrokerProcess, id: &str) -> ApiResponse {
    let complete = || broker.http.post(format!("{}/lfs/uploads/{id}/complete", process.url()));
    retry_while_unavailable(async || broker.send(complete()).await).await
}

async fn wait_for_state(broker: &TestBroker, process: &BrokerProcess, id: &str, state: &str) -> ApiResponse {
    for _ in 0..150 {
        let found = broker.send(broker.http.get(format!("{}/lfs/uploads/{id}", process.url()))).await;
        if found.state() == state {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("{id} never became {state}:\n{}", process.log());
}

/// Moves every published upload back to `verified` with an outbox row, in one commit, as a restored database has it.
async fn lose_publications(broker: &TestBroker, lost: LostCommits) {
    let back = "with back as (
             update upload_sessions set state = 'verified', published_partition = null, published_offset = null, published_at = null
             where state = 'published' returning id),
         unwritten as (delete from upload_history using back where session_id = back.id and to_state = 'published'),
         shards as (
             update relay_shards set last_batch = last_batch - $1::int
             where shard in (select shard from outbox_log) returning shard, last_batch)
         insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at, batch, attempts)
             select session_id, log.shard, topic, ordering, partition, key, value, headers, created_at, next_try_at,
                    case when $1::int = 0 then shards.last_batch end, 0
             from (select distinct on (session_id) * from outbox_log order by session_id, number) log join back on back.id = session_id join shards on shards.shard = log.shard";
    let inserted = sqlx::query(back).bind(i32::from(lost.claimed_batch)).execute(&broker.db).await.unwrap();
    assert!(inserted.rows_affected() > 0);
}

#[tokio::test]
async fn a_relay_resolves_its_shard_again_when_the_database_loses_a_publication() {
    let (broker, process) = start_process(&[]).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    let before = wait_for_state(&broker, &process, &first, "published").await;
    lose_publications(&broker, LostCommits { claimed_batch: false }).await;
    // Its outbox row is claimed by a batch, so it may have been sent.
    let after = wait_for_state(&broker, &process, &first, "published").await;
    process.wait_for_log(NOTICED).await;
    assert!(process.log().contains("and has claimed rows"), "{}", process.log());
    let second = put(&broker, &process, b"second").await;
    complete(&broker, &process, &second).await;
    wait_for_state(&broker, &process, &second, "published").await;
    let records = broker.records(&broker.topic).await;
    let ids: Vec<String> = records.iter().map(upload_id_of).collect();
    if broker.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
        assert_eq!(ids, [first, second]);
    } else {
        // Without markers a row that was claimed and not marked published is sent again.
        assert_eq!(broker.distinct_records().await.len(), 2);
    }
}

#[tokio::test]
async fn a_relay_drops_its_shard_when_the_database_loses_a_claimed_batch() {
    let (broker, process) = start_process(&[("LFS_BROKER_COMPLETE_WAIT_SECONDS", "2")]).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    let before = wait_for_state(&broker, &process, &first, "published").await;
    let second = put(&broker, &process, b"second").await;
    lose_publications(&broker, LostCommits { claimed_batch: true }).await;
    process.wait_for_log(NOTICED).await;
    // The relay publishes within milliseconds if it may; in two seconds it tries several times.
    assert_eq!(complete(&broker, &process, &second).await.expect(202).state(), "verified");
    process.wait_for_log("the database is older than Kafka").await;
    assert_eq!(broker.records(&broker.topic).await.len(), 1, "nothing is sent a second time");

    let fixed = audit(&broker, true).await.unwrap();
    assert_eq!(fixed.finding(FindingKind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    assert_eq!(fixed.finding(FindingKind::MarkerAhead).map(|finding| finding.fixed), Some(1));
    wait_for_state(&broker, &process, &second, "published").await;
    let after = wait_for_state(&broker, &process, &first, "published").await;
    assert_eq!(after.json["record"], before.json["record"]);
    let ids: Vec<String> = broker.records(&broker.topic).await.iter().map(upload_id_of).collect();
    assert_eq!(ids, [first, second]);
    assert_clean(&broker).await;
}

/// A published upload and one that the database has reopened between the pointer's record in Kafka and its row. The relay
/// has noticed. The broker waits a second for a publication.
async fn reopen_a_sent_upload() -> (TestBroker, BrokerProcess, String) {
    let pause_after_second_batch =
        [("FAILPOINTS", "relay.sent=1*off->1*return(4000)"), ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "1")];
    let (broker, process) = start_process(&pause_after_second_batch).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    wait_for_state(&broker, &process, &first, "published").await;
    let second = put(&broker, &process, b"second").await;
    complete(&broker, &process, &second).await.expect(202);
    process.wait_for_log("reached failpoint relay.sent").await;
    // The pointer is sent. Before it is marked published, the database goes back to before its verification.
    let back = format!(
        "with back as ({REOPENED} where state = 'verified' returning id, tenant, size_bytes),
         unsent as (delete from outbox using back where session_id = back.id returning shard),
         shards as (update relay_shards set last_batch = last_batch - 1 where shard in (select shard from unsent))
         {RESERVED}"
    );
    assert_eq!(sqlx::query(sqlx::AssertSqlSafe(back)).execute(&broker.db).await.unwrap().rows_affected(), 1);
    let line = process.wait_for_log("PostgreSQL lost commits").await;
    assert!(line.contains("kafka holds 1 pointers") && line.contains("but the database recorded 0 of them"), "{line}");
    assert!(line.contains(NOTICED), "{line}");
    (broker, process, second)
}

#[tokio::test]
async fn a_relay_notices_that_the_database_does_not_know_the_pointer_it_has_just_published() {
    reopen_a_sent_upload().await;
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_relay_drops_its_shards_when_the_database_does_not_know_the_pointer_it_has_just_published() {
    let (broker, process, second) = reopen_a_sent_upload().await;
    assert!(broker.is_exactly_once(), "only a Kafka with transactions has markers");
    // The client completes again, and the relay refuses the shard.
    assert_eq!(complete(&broker, &process, &second).await.expect(202).state(), "verified");
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    assert!(audit(&broker, true).await.unwrap().finding(FindingKind::MarkerAhead).is_some());
    wait_for_state(&broker, &process, &second, "published").await;
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    assert_clean(&broker).await;
}

#[tokio::test]
async fn a_pointer_in_the_marker_stays_claimed_when_the_database_loses_that_it_was_published() {
    // The relay pauses after it has marked the marker's pointers published, before it releases the other rows.
    let (broker, process) = start_process(&[("FAILPOINTS", "relay.recovered=1*return(3000)")]).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    let before = wait_for_state(&broker, &process, &first, "published").await;
    lose_publications(&broker, LostCommits { claimed_batch: false }).await;
    process.wait_for_log("reached failpoint relay.recovered").await;
    if broker.is_exactly_once() {
        lose_publications(&broker, LostCommits { claimed_batch: false }).await;
    }
    // A later pointer, so that an earlier one in flight would have arrived before it.
    let second = put(&broker, &process, b"second").await;
    complete(&broker, &process, &second).await;
    wait_for_state(&broker, &process, &second, "published").await;
    let after = wait_for_state(&broker, &process, &first, "published").await;
    assert_eq!(broker.distinct_records().await.len(), 2);
    if broker.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
    }
}

#[tokio::test]
async fn a_pointer_in_the_marker_is_not_sent_again_even_if_its_outbox_row_is_not_claimed() {
    let (broker, process) = start_process(&[]).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    let before = wait_for_state(&broker, &process, &first, "published").await;
    drop(process);
    // The database lost commits, and a relay that kept running has claimed another batch under the marker's number.
    lose_publications(&broker, LostCommits { claimed_batch: false }).await;
    sqlx::raw_sql("update outbox set batch = null").execute(&broker.db).await.unwrap();
    let process = broker.spawn_process(&[]).await;
    let after = wait_for_state(&broker, &process, &first, "published").await;
    if broker.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
    }
    let second = put(&broker, &process, b"second").await;
    complete(&broker, &process, &second).await;
    wait_for_state(&broker, &process, &second, "published").await;
    assert_eq!(broker.distinct_records().await.len(), 2);
}

#[tokio::test]
async fn a_shard_whose_marker_lists_a_reopened_upload_waits_for_the_audit() {
    let (broker, process) = start_process(&[]).await;
    let first = put(&broker, &process, b"first").await;
    complete(&broker, &process, &first).await;
    wait_for_state(&broker, &process, &first, "published").await;
    drop(process);
    let back = format!("with back as ({REOPENED} where state = 'published' returning tenant, size_bytes) {RESERVED}");
    assert_eq!(sqlx::query(sqlx::AssertSqlSafe(back)).execute(&broker.db).await.unwrap().rows_affected(), 1);
    if broker.is_exactly_once() {
        let refused = app::start(broker.settings.clone()).await.err();
        assert!(matches!(refused, Some(app::Error::DatabaseRestored(_))), "{refused:?}");
    }
    assert_eq!(audit(&broker, true).await.unwrap().finding(FindingKind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    let process = broker.spawn_process(&[]).await;
    let second = put(&broker, &process, b"second").await;
    complete(&broker, &process, &second).await;
    wait_for_state(&broker, &process, &second, "published").await;
    wait_for_state(&broker, &process, &first, "published").await;
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    assert_clean(&broker).await;
}

/// Deletes an upload's row when its multipart upload is to be stored, and keeps the object key.
const LOSE_OPENED: &str = "create table lost (object_key text);
    create function lose_opened() returns trigger language plpgsql as $$ begin
        insert into lost select old.object_key;
        delete from upload_sessions where id = old.id;
        return null;
    end $$;
    create trigger lose_opened before update of s3_upload_id on upload_sessions for each row execute function lose_opened();";

#[tokio::test]
async fn a_multipart_upload_is_aborted_when_the_database_loses_its_row() {
    let broker = TestBroker::start().await;
    sqlx::raw_sql(LOSE_OPENED).execute(&broker.db).await.unwrap();
    let content = bytes(PART_BYTES + 1, 1);
    let refused = broker.open_multipart(&content, json!({})).await.expect(503);
    assert_eq!(refused.code(), "dependency-unavailable");
    let lost: Vec<String> = sqlx::query_scalar("select object_key from lost").fetch_all(&broker.db).await.unwrap();
    assert_eq!(lost.len(), 1);
    assert!(!broker.has_open_multipart(&lost[0]).await, "no row refers to the multipart upload, so nothing removes it later");
}
