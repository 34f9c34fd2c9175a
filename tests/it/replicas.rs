//! Several replicas on one database: they share the shards and wake each other, without waiting for a poll.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use lfs_broker::notify;
use serde_json::json;
use uuid::Uuid;

use crate::harness::faults::retry_while_unavailable;
use crate::harness::in_process::InProcessBroker;
use crate::harness::{TestBroker, sha256};

/// What the test waits for can only follow from a notification: the next poll and the next renewal come in half an hour.
const WITHOUT_POLLS: notify::Settings =
    notify::Settings { shard_lease: Duration::from_secs(3600 * 2), poll_interval: Duration::from_secs(3600) };

impl TestBroker {
    async fn start_without_polls() -> Self {
        Self::start_with(|settings| settings.notify = WITHOUT_POLLS).await
    }

    /// How many shards each owner has, the smallest number first.
    async fn shards_by_owner(&self) -> Vec<i64> {
        let counts = "select count(*) from relay_shards where owner is not null group by owner order by 1";
        sqlx::query_scalar(counts).fetch_all(&self.db).await.unwrap()
    }

    async fn wait_until_shards_are(&self, expected: &[i64]) {
        let description = format!("the owners have {expected:?} shards");
        self.eventually(&description, async || self.shards_by_owner().await == expected).await;
    }

    async fn replica_count(&self) -> i64 {
        sqlx::query_scalar("select count(*) from relay_replicas").fetch_one(&self.db).await.unwrap()
    }

    /// Owner and epoch of each shard.
    async fn leases(&self) -> BTreeMap<i32, (Option<Uuid>, i64)> {
        let leases: Vec<(i32, Option<Uuid>, i64)> =
            sqlx::query_as("select shard, owner, epoch from relay_shards").fetch_all(&self.db).await.unwrap();
        leases.into_iter().map(|(shard, owner, epoch)| (shard, (owner, epoch))).collect()
    }

    /// The process ids of the connections that receive notifications.
    async fn notification_connections(&self) -> Vec<i32> {
        let connections = "select pid from pg_stat_activity where datname = current_database()
             and application_name = 'lfs-broker notifications' and query like 'select pg_notify%' order by pid";
        sqlx::query_scalar(connections).fetch_all(&self.db).await.unwrap()
    }

    /// Completes uploads of eight keys, which are in all shards, through each replica, and asserts that all are published.
    async fn publish_through(&self, bases: &[String]) {
        for base in bases {
            join_all((0..8).map(|number| async move {
                let opened = self.open_and_put(b"hello", json!({"key": format!("k{number}")})).await;
                let complete = self.http.post(format!("{base}/lfs/uploads/{}/complete", opened.id()));
                let completed = self.send(complete).await.expect(200);
                assert_eq!(completed.state(), "published", "through {base}: {}", completed.text);
            }))
            .await;
        }
    }

    fn bases(&self, replicas: &[&InProcessBroker]) -> Vec<String> {
        let others = replicas.iter().map(|replica| format!("http://{}", replica.address()));
        std::iter::once(self.url()).chain(others).collect()
    }
}

#[tokio::test]
async fn replicas_share_the_shards_and_each_publishes_what_any_completes() {
    let broker = TestBroker::start_without_polls().await;
    broker.wait_until_shards_are(&[4]).await;
    broker.publish_through(&broker.bases(&[])).await;
    let second = broker.replica().await;
    broker.wait_until_shards_are(&[2, 2]).await;
    broker.publish_through(&broker.bases(&[&second])).await;
    let third = broker.replica().await;
    broker.wait_until_shards_are(&[1, 1, 2]).await;
    broker.publish_through(&broker.bases(&[&second, &third])).await;
    // A replica that stops hands its shards over at once.
    second.stop().await;
    broker.wait_until_shards_are(&[2, 2]).await;
    broker.publish_through(&broker.bases(&[&third])).await;
    third.stop().await;
    broker.wait_until_shards_are(&[4]).await;
    assert_eq!(broker.replica_count().await, 1);
    broker.publish_through(&broker.bases(&[])).await;
    assert_eq!(broker.distinct_records().await.len(), 8 * 9);
}

#[tokio::test]
async fn replicas_that_lost_their_connections_for_notifications_hear_each_other_again() {
    let broker = TestBroker::start_without_polls().await;
    let second = broker.replica().await;
    broker.wait_until_shards_are(&[2, 2]).await;
    let before = broker.notification_connections().await;
    assert_eq!(before.len(), 2);
    sqlx::query("select pg_terminate_backend(pid) from unnest($1::int[]) pid").bind(&before).execute(&broker.db).await.unwrap();
    broker
        .eventually("both replicas are connected again", async || {
            let now = broker.notification_connections().await;
            now.len() == 2 && now.iter().all(|pid| !before.contains(pid))
        })
        .await;
    broker.publish_through(&broker.bases(&[&second])).await;
    second.stop().await;
}

#[tokio::test]
async fn replicas_without_notifications_poll_for_what_the_others_do() {
    // Renewals are far apart, so that only the faster polls find the pointers of other replicas in time.
    let broker = TestBroker::start_with(|settings| settings.notify.shard_lease = WITHOUT_POLLS.shard_lease).await;
    let second = broker.replica().await;
    broker.wait_until_shards_are(&[2, 2]).await;
    let bases = broker.bases(&[&second]);
    let keep_disconnected = async {
        loop {
            let terminate = "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and application_name = 'lfs-broker notifications'";
            sqlx::query(terminate).execute(&broker.db).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = broker.publish_through(&bases) => {}
        () = keep_disconnected => {}
    }
    second.stop().await;
}

#[tokio::test]
async fn the_shards_of_a_replica_that_died_are_shared_by_the_others_when_its_lease_has_ended() {
    let broker = TestBroker::start().await;
    let (second, third) = (broker.replica().await, broker.replica().await);
    broker.wait_until_shards_are(&[1, 1, 2]).await;
    third.crash();
    broker.wait_until_shards_are(&[2, 2]).await;
    second.crash();
    broker.wait_until_shards_are(&[4]).await;
    broker.eventually("the dead replicas are removed", async || broker.replica_count().await == 1).await;
    broker.publish_through(&broker.bases(&[])).await;
}

#[tokio::test]
async fn a_shard_with_a_running_batch_is_given_back_only_after_the_batch() {
    let mut broker = TestBroker::start().await;
    broker.log_outbox_inserts().await;
    broker.stop().await;
    let process = broker.spawn_process(&[("FAILPOINTS", "relay.claimed=4*return(15000)")]).await;
    // So many keys that each of the four shards gets some, whatever the topic's name: of 12, one in eight topics left a shard empty.
    let completes = (0..48).map(|number| {
        let (broker, process) = (&broker, &process);
        async move {
            let body = json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello"), "key": format!("k{number}")});
            let open = || broker.http.post(format!("{}/lfs/uploads", process.url())).json(&body);
            let opened = retry_while_unavailable(async || broker.send(open()).await).await.expect(201);
            broker.put(&opened.json["upload"], b"hello").await.expect(200);
            let complete = broker.http.post(format!("{}/lfs/uploads/{}/complete", process.url(), opened.id()));
            broker.send(complete).await
        }
    });
    let completes = join_all(completes);
    let claimed_shards = "select count(distinct shard) from outbox where batch is not null";
    let all_run = broker.eventually("every shard has a batch", async || {
        sqlx::query_scalar::<_, i64>(claimed_shards).fetch_one(&broker.db).await.unwrap() == 4
    });
    tokio::pin!(completes);
    tokio::select! {
        _ = &mut completes => panic!("the batches wait in the failpoint"),
        () = all_run => {}
    }
    let before = broker.leases().await;
    let second = broker.replica().await;
    broker.eventually("the second replica has joined", async || broker.replica_count().await == 2).await;
    // Two renewals later the first replica knows the second.
    let last_end = "select max(until) from relay_shards";
    for _ in 0..2 {
        let end: time::OffsetDateTime = sqlx::query_scalar(last_end).fetch_one(&broker.db).await.unwrap();
        broker
            .eventually("the leases are renewed", async || {
                sqlx::query_scalar::<_, time::OffsetDateTime>(last_end).fetch_one(&broker.db).await.unwrap() > end
            })
            .await;
    }
    let is_running: i64 = sqlx::query_scalar(claimed_shards).fetch_one(&broker.db).await.unwrap();
    assert_eq!(is_running, 4, "the machine is too slow for the failpoint");
    assert_eq!(broker.leases().await, before, "a shard was taken from a replica that was publishing it");
    broker.wait_until_shards_are(&[2, 2]).await;
    completes.await;
    broker
        .eventually("every pointer is published", async || {
            sqlx::query_scalar::<_, i64>("select count(*) from outbox").fetch_one(&broker.db).await.unwrap() == 0
        })
        .await;
    assert!(!process.log().contains("taken over"), "no batch was lost: {}", process.log());
    assert_eq!(broker.distinct_records().await.len(), 48);
    second.stop().await;
}
