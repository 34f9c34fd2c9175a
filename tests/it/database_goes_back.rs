//! PostgreSQL goes back under a broker that runs: a backup is restored, or a standby is promoted that lacks the last
//! commits. The relay holds the shards, and the lease rows are as they were.

use lfs_broker::app;
use lfs_broker::audit::Kind;
use serde_json::json;

use crate::audit::{audit, is_clean};
use crate::harness::faults::upload_of;
use crate::harness::serving::Serving;
use crate::harness::{Answer, House};

/// What the relay says when it notices.
const NOTICED: &str = "is compared with Kafka before it goes on";

/// Puts uploads back to before their proof.
const REOPENED: &str = "update upload_sessions set state = 'open', verified_at = null, integrity = null, pointer = null,
    object_etag = null, object_version_id = null, published_partition = null, published_offset = null, published_at = null";
const RESERVED: &str = "update tenants set open_sessions = open_sessions + 1, reserved_bytes = reserved_bytes + back.size_bytes
    from back where tenants.tenant = back.tenant";

/// What a commit took with it when it was lost, or did not.
#[derive(Clone, Copy)]
struct Lost {
    stamp: bool,
}

/// A house whose broker is a process of its own, so that its log can be read.
async fn broker(environment: &[(&str, &str)]) -> (House, Serving) {
    let mut house = House::new().await;
    house.log_the_outbox().await;
    house.stop().await;
    let serving = house.serving(environment).await;
    (house, serving)
}

/// Opens an upload and puts its bytes.
async fn put(house: &House, serving: &Serving, content: &[u8]) -> String {
    let body = json!({"topic": house.topic, "size": content.len(), "sha256": crate::harness::sha256(content), "key": "k"});
    let opened = house.send(house.http.post(format!("{}/lfs/uploads", serving.url())).json(&body)).await.expect(201);
    house.put(&opened.json["upload"], content).await.expect(200);
    opened.id()
}

async fn complete(house: &House, serving: &Serving, id: &str) -> Answer {
    house.send(house.http.post(format!("{}/lfs/uploads/{id}/complete", serving.url()))).await
}

async fn until(house: &House, serving: &Serving, id: &str, state: &str) -> Answer {
    for _ in 0..150 {
        let found = house.send(house.http.get(format!("{}/lfs/uploads/{id}", serving.url()))).await;
        if found.state() == state {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("{id} never became {state}:\n{}", serving.log());
}

/// Puts every published upload back to where it waited for the relay, in one commit, as a restored database has it.
async fn go_back(house: &House, lost: Lost) {
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
    let moved = sqlx::query(back).bind(i32::from(lost.stamp)).execute(&house.db).await.unwrap();
    assert!(moved.rows_affected() > 0);
}

#[tokio::test]
async fn a_relay_that_holds_a_shard_settles_it_anew_when_the_database_loses_what_was_published() {
    let (house, serving) = broker(&[]).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    let before = until(&house, &serving, &first, "published").await;
    go_back(&house, Lost { stamp: false }).await;
    // Its stamp says that it may have been sent.
    let after = until(&house, &serving, &first, "published").await;
    serving.says(NOTICED).await;
    assert!(serving.log().contains("and is unsettled"), "{}", serving.log());
    let second = put(&house, &serving, b"second").await;
    complete(&house, &serving, &second).await;
    until(&house, &serving, &second, "published").await;
    let records = house.records(&house.topic).await;
    let ids: Vec<String> = records.iter().map(upload_of).collect();
    if house.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
        assert_eq!(ids, [first, second]);
    } else {
        // What was stamped and not marked is sent again where no marker tells.
        assert_eq!(house.distinct_records().await.len(), 2);
    }
}

#[tokio::test]
async fn a_relay_that_holds_a_shard_drops_it_when_the_database_forgets_that_a_batch_was_stamped() {
    let (house, serving) = broker(&[("LFS_BROKER_COMPLETE_WAIT_SECONDS", "2")]).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    let before = until(&house, &serving, &first, "published").await;
    let second = put(&house, &serving, b"second").await;
    go_back(&house, Lost { stamp: true }).await;
    serving.says(NOTICED).await;
    // Two seconds are several turns of the relay, which publishes in milliseconds where it may.
    assert_eq!(complete(&house, &serving, &second).await.expect(202).state(), "verified");
    serving.says("the database is older than Kafka").await;
    assert_eq!(house.records(&house.topic).await.len(), 1, "nothing is sent a second time");

    let fixed = audit(&house, true).await.unwrap();
    assert_eq!(fixed.finding(Kind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    assert_eq!(fixed.finding(Kind::MarkerAhead).map(|finding| finding.fixed), Some(1));
    until(&house, &serving, &second, "published").await;
    let after = until(&house, &serving, &first, "published").await;
    assert_eq!(after.json["record"], before.json["record"]);
    let ids: Vec<String> = house.records(&house.topic).await.iter().map(upload_of).collect();
    assert_eq!(ids, [first, second]);
    is_clean(&house).await;
}

#[tokio::test]
async fn a_relay_drops_its_shards_when_the_database_does_not_know_what_it_has_just_published() {
    let held_up = [("FAILPOINTS", "relay.sent=1*off->1*return(4000)"), ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "1")];
    let (house, serving) = broker(&held_up).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    until(&house, &serving, &first, "published").await;
    let second = put(&house, &serving, b"second").await;
    complete(&house, &serving, &second).await.expect(202);
    serving.says("reached failpoint relay.sent").await;
    // It is sent. The database goes back to before its proof, while it is on its way to be marked.
    let back = format!(
        "with back as ({REOPENED} where state = 'verified' returning id, tenant, size_bytes),
         unsent as (delete from outbox using back where session_id = back.id returning shard),
         shards as (update relay_shards set last_batch = last_batch - 1 where shard in (select shard from unsent))
         {RESERVED}"
    );
    assert_eq!(sqlx::query(sqlx::AssertSqlSafe(back)).execute(&house.db).await.unwrap().rows_affected(), 1);
    let told = serving.says("PostgreSQL lost commits").await;
    assert!(told.contains("kafka holds 1 pointers") && told.contains("the database took note of 0"), "{told}");
    assert!(told.contains(NOTICED), "{told}");
    if !house.is_exactly_once() {
        return;
    }
    // The client asks again, and the shard is refused.
    assert_eq!(complete(&house, &serving, &second).await.expect(202).state(), "verified");
    assert_eq!(house.records(&house.topic).await.len(), 2);
    assert!(audit(&house, true).await.unwrap().finding(Kind::MarkerAhead).is_some());
    until(&house, &serving, &second, "published").await;
    assert_eq!(house.records(&house.topic).await.len(), 2);
    is_clean(&house).await;
}

#[tokio::test]
async fn a_pointer_that_the_marker_lists_keeps_its_stamp_when_the_database_loses_that_it_was_settled() {
    // Held up after what the marker lists is written down, before the other stamps are taken back.
    let (house, serving) = broker(&[("FAILPOINTS", "relay.settled=1*return(3000)")]).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    let before = until(&house, &serving, &first, "published").await;
    go_back(&house, Lost { stamp: false }).await;
    serving.says("reached failpoint relay.settled").await;
    if house.is_exactly_once() {
        go_back(&house, Lost { stamp: false }).await;
    }
    // A later one, so that an earlier one that is under way would have arrived.
    let second = put(&house, &serving, b"second").await;
    complete(&house, &serving, &second).await;
    until(&house, &serving, &second, "published").await;
    let after = until(&house, &serving, &first, "published").await;
    assert_eq!(house.distinct_records().await.len(), 2);
    if house.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
    }
}

#[tokio::test]
async fn a_pointer_that_the_marker_lists_is_not_sent_again_though_it_bears_no_stamp() {
    let (house, serving) = broker(&[]).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    let before = until(&house, &serving, &first, "published").await;
    drop(serving);
    // The database went back, and a relay that lived on has stamped another batch under the number of the marker.
    go_back(&house, Lost { stamp: false }).await;
    sqlx::raw_sql("update outbox set batch = null").execute(&house.db).await.unwrap();
    let serving = house.serving(&[]).await;
    let after = until(&house, &serving, &first, "published").await;
    if house.is_exactly_once() {
        assert_eq!(after.json["record"], before.json["record"]);
    }
    let second = put(&house, &serving, b"second").await;
    complete(&house, &serving, &second).await;
    until(&house, &serving, &second, "published").await;
    assert_eq!(house.distinct_records().await.len(), 2);
}

#[tokio::test]
async fn a_shard_whose_marker_lists_an_upload_that_is_open_again_waits_for_the_audit() {
    let (house, serving) = broker(&[]).await;
    let first = put(&house, &serving, b"first").await;
    complete(&house, &serving, &first).await;
    until(&house, &serving, &first, "published").await;
    drop(serving);
    let back = format!("with back as ({REOPENED} where state = 'published' returning tenant, size_bytes) {RESERVED}");
    assert_eq!(sqlx::query(sqlx::AssertSqlSafe(back)).execute(&house.db).await.unwrap().rows_affected(), 1);
    if house.is_exactly_once() {
        let refused = app::start(house.settings.clone()).await.err();
        assert!(matches!(refused, Some(app::Error::Restored(_))), "{refused:?}");
    }
    assert_eq!(audit(&house, true).await.unwrap().finding(Kind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    let serving = house.serving(&[]).await;
    let second = put(&house, &serving, b"second").await;
    complete(&house, &serving, &second).await;
    until(&house, &serving, &second, "published").await;
    until(&house, &serving, &first, "published").await;
    assert_eq!(house.records(&house.topic).await.len(), 2);
    is_clean(&house).await;
}
