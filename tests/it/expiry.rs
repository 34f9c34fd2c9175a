//! An upload that ends without a pointer leaves no object, no multipart upload, no quota and no idempotency key.

use std::time::Duration;

use lfs_broker::objects::Objects;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::harness::fault_proxy::Call;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes};
use crate::s3_faults::{start_broker_on, start_faulty_s3};

/// Just after the end of a session with the default policy.
const EXPIRED: Duration = Duration::from_secs(3601);

#[derive(Debug, Clone, Copy)]
enum End {
    Expired,
    Aborted,
    Rejected,
}

const ENDS: [End; 3] = [End::Expired, End::Aborted, End::Rejected];

impl TestBroker {
    /// When the upload's objects in S3 are removed again.
    async fn cleanup_due(&self, id: &str) -> Option<OffsetDateTime> {
        let due: (Option<OffsetDateTime>,) = sqlx::query_as("select cleanup_due_at from upload_sessions where id = $1::uuid")
            .bind(id)
            .fetch_one(&self.db)
            .await
            .unwrap();
        due.0
    }

    /// Waits until the sweeper has worked on everything that is due now: it works on what is due for longer first.
    async fn wait_for_sweep(&self) {
        let id = self.open(b"sweep", json!({})).await.expect(201).id();
        self.delete(&format!("/lfs/uploads/{id}")).await.expect(204);
        self.eventually("the sweeper cleans up after an abort", || async {
            let later = OffsetDateTime::now_utc() + self.clock_advance() + Duration::from_secs(300);
            self.cleanup_due(&id).await.is_some_and(|due| due > later)
        })
        .await;
    }

    /// Ends an upload without a pointer, after its bytes were put.
    async fn end(&self, opened: &Value, reason: End) {
        let id = opened["id"].as_str().unwrap();
        match reason {
            End::Expired => self.advance_clock(EXPIRED),
            End::Aborted => drop(self.delete(&format!("/lfs/uploads/{id}")).await.expect(204)),
            End::Rejected => {
                self.put_object(opened["object_key"].as_str().unwrap(), b"of another writer", None).await;
                self.complete(id).await.expect_problem(422, "object-foreign");
            }
        }
        // The state changes first, then S3 is cleaned up. Afterwards the upload waits for the second cleanup.
        self.eventually("the first cleanup is done", || async {
            let due = self.cleanup_due(id).await;
            due.is_some_and(|due| due > OffsetDateTime::now_utc() + Duration::from_secs(300))
        })
        .await;
        assert_eq!(self.upload(id).await.state(), format!("{reason:?}").to_lowercase());
    }
}

#[tokio::test]
async fn an_upload_that_ends_without_a_pointer_leaves_nothing() {
    for reason in ENDS {
        let broker = TestBroker::start().await;
        let content = bytes(PART_BYTES + 9, 1);
        let single = match reason {
            End::Rejected => broker.open(b"hello", json!({})).await.expect(201),
            End::Expired | End::Aborted => broker.open_and_put(b"hello", json!({})).await,
        };
        let parts = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
        broker.put(&parts.json["parts"][0], &content[..PART_BYTES]).await.expect(200);
        assert_eq!(broker.tenant_usage().await, (2, 5 + content.len() as i64));
        broker.end(&single.json, reason).await;
        // An upload with missing parts is not rejected but stays open, so it is aborted instead.
        broker.end(&parts.json, if matches!(reason, End::Rejected) { End::Aborted } else { reason }).await;
        broker.wait_until_s3_is_empty(parts.json["object_key"].as_str().unwrap()).await;
        assert_eq!(broker.tenant_usage().await, (0, 0), "{reason:?}");
        assert_eq!(broker.records(&broker.topic).await.len(), 0);
    }
}

#[tokio::test]
async fn bytes_that_arrive_after_the_end_are_removed_by_the_second_cleanup() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 2);
    let mut opened = Vec::new();
    for _ in ENDS {
        opened.push(broker.open(b"hello", json!({})).await.expect(201));
    }
    let parts = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    // Expired last, because it advances the clock beyond the cleanups that follow the expiry of the other URLs.
    for (opened, reason) in opened.iter().zip([End::Aborted, End::Rejected, End::Expired]) {
        broker.end(&opened.json, reason).await;
    }
    let key = parts.json["object_key"].as_str().unwrap();
    broker.wait_until_s3_is_empty(key).await;
    for ended in &opened[..2] {
        let id = ended.id();
        broker
            .eventually("only the last cleanup is due", || async {
                broker.cleanup_due(&id).await.is_some_and(|due| due > OffsetDateTime::now_utc() + Duration::from_secs(4000))
            })
            .await;
    }
    // The URLs are still valid for S3, whose clock was not advanced. These are PUTs that were in flight.
    for opened in &opened {
        broker.put(&opened.json["upload"], b"hello").await.expect(200);
    }
    // And a CreateMultipartUpload whose response was lost.
    broker.s3.create_multipart_upload().bucket(&broker.bucket).key(key).send().await.unwrap();
    assert_eq!(broker.objects().await.len(), 3);
    // After the first two ended, 900 s for the URL, a minute, and the longest PUT must pass; 3,601 s have passed.
    broker.advance_clock(Duration::from_secs(900));
    broker.wait_for_sweep().await;
    assert_eq!(broker.objects().await.len(), 3, "the longest PUT may still be in flight");
    broker.advance_clock(Duration::from_secs(100));
    broker
        .eventually("the objects of aborted and rejected uploads are removed", || async { broker.objects().await.len() == 1 })
        .await;
    broker.advance_clock(Duration::from_secs(2500));
    broker.wait_for_sweep().await;
    assert_eq!(broker.objects().await.len(), 1, "the longest PUT may still be in flight");
    broker.advance_clock(Duration::from_secs(110));
    broker.wait_until_s3_is_empty(key).await;
    for opened in opened.iter().chain([&parts]) {
        let id = opened.id();
        broker.eventually("no further cleanup is due", || async { broker.cleanup_due(&id).await.is_none() }).await;
    }
}

#[tokio::test]
async fn a_published_upload_holds_no_quota_and_its_object_is_never_removed() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({})).await;
    assert_eq!(broker.tenant_usage().await, (0, 0));
    broker.advance_clock(Duration::from_secs(30 * 86_400));
    // The end of another upload shows that the sweeper has run.
    let other = broker.open(b"other", json!({})).await.expect(201);
    broker.end(&other.json, End::Aborted).await;
    assert_eq!(broker.objects().await.len(), 1);
    assert_eq!(broker.upload(&done.id()).await.state(), "published");
}

#[tokio::test]
async fn an_upload_that_is_being_completed_does_not_expire() {
    let broker = TestBroker::start().await;
    let opened = broker.open_and_put(b"hello", json!({})).await;
    broker.lease_to_dead_replica(&opened.id()).await;
    let longer = "update upload_sessions set lease_until = clock_timestamp() + interval '2 hours'";
    sqlx::raw_sql(longer).execute(&broker.db).await.unwrap();
    broker.advance_clock(EXPIRED);
    let other = broker.open(b"other", json!({})).await.expect(201);
    broker.end(&other.json, End::Aborted).await;
    assert_eq!(broker.upload(&opened.id()).await.state(), "completing");
    broker.advance_clock(EXPIRED);
    broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(broker.tenant_usage().await, (0, 0));
}

#[tokio::test]
async fn an_idempotency_key_is_deleted_one_day_after_the_end_of_its_upload() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 5, "sha256": crate::harness::sha256(b"hello")});
    let open = || broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "day").json(&body));
    let keys = || async {
        let remaining: (i64,) = sqlx::query_as("select count(*) from idempotency_keys").fetch_one(&broker.db).await.unwrap();
        remaining.0
    };
    let first = open().await.expect(201);
    broker.put(&first.json["upload"], b"hello").await.expect(200);
    broker.complete(&first.id()).await.expect(200);
    broker.advance_clock(Duration::from_secs(86_300));
    assert_eq!(open().await.expect(200).id(), first.id());
    broker.advance_clock(Duration::from_secs(200));
    broker.eventually("the key is deleted", || async { keys().await == 0 }).await;
    assert_ne!(open().await.expect(201).id(), first.id());
    // The second upload is open: its key is kept until one day after that upload has ended.
    broker.advance_clock(EXPIRED);
    broker.eventually("the session has expired", || async { broker.tenant_usage().await == (0, 0) }).await;
    assert_eq!(keys().await, 1);
    broker.advance_clock(Duration::from_secs(86_500));
    broker.eventually("the second key is deleted too", || async { keys().await == 0 }).await;
}

#[tokio::test]
async fn probe_objects_of_a_killed_broker_are_removed() {
    let broker = TestBroker::start().await;
    let prefix = format!(".lfs-broker-probe/{}", uuid::Uuid::new_v4());
    broker.put_object(&format!("{prefix}/honest"), b"hello", None).await;
    broker.put_object(&format!("{prefix}/copy"), b"hello", None).await;
    let part = format!("{prefix}/copy-part");
    broker.s3.create_multipart_upload().bucket(&broker.bucket).key(&part).send().await.unwrap();
    assert!(broker.has_open_multipart(&part).await);
    let objects = Objects::connect(&broker.settings.objects).await.unwrap();
    objects.remove_stale_probes(&broker.bucket, Duration::from_millis(100)).await.unwrap();
    broker.wait_until_s3_is_empty(&part).await;
}

#[tokio::test]
async fn an_upload_whose_expiry_is_extended_while_the_sweeper_reads_it_does_not_expire() {
    let broker = TestBroker::start().await;
    let opened = broker.open_multipart(&bytes(PART_BYTES + 9, 7), json!({})).await.expect(201);
    // As a call for parts that read the clock just before the end and has not committed yet.
    let mut extension = broker.db.begin().await.unwrap();
    let extend = "update upload_sessions set expires_at = expires_latest_at";
    sqlx::raw_sql(extend).execute(&mut *extension).await.unwrap();
    broker.advance_clock(EXPIRED);
    let waiting_statements = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock' and query like '%update upload_sessions%'";
    let waiting = async || sqlx::query_scalar::<_, i64>(waiting_statements).fetch_one(&broker.db).await.unwrap();
    broker.eventually("the sweeper has read the old expiry and waits for the row", || async { waiting().await == 1 }).await;
    extension.commit().await.unwrap();
    broker.eventually("the sweeper has continued", || async { waiting().await == 0 }).await;
    // The end of another upload shows that the sweeper has run.
    let other = broker.open(b"other", json!({})).await.expect(201);
    broker.end(&other.json, End::Aborted).await;
    assert_eq!(broker.upload(&opened.id()).await.expect(200).state(), "open");
}

#[tokio::test]
async fn cleanups_run_concurrently_on_a_slow_s3_and_each_upload_belongs_to_one_replica() {
    const MANY: usize = 16;
    let s3 = start_faulty_s3().await;
    let mut broker = start_broker_on(&s3).await;
    let mut ids = Vec::new();
    for _ in 0..MANY {
        ids.push(broker.open(b"hello", json!({})).await.expect(201).id());
    }
    broker.restart(|settings| settings.sweeper.interval = Duration::from_secs(4)).await;
    let _other = broker.replica().await;
    // A busy machine needs time to start the concurrent calls.
    s3.delay_calls(Duration::from_secs(1));
    let ended = "update upload_sessions set state = 'aborted', cleanup_due_at = clock_timestamp()";
    sqlx::raw_sql(ended).execute(&broker.db).await.unwrap();
    let cleaned_up = "select count(*) from upload_sessions where cleanup_due_at > clock_timestamp() + interval '5 minutes'";
    broker
        .eventually("the first cleanup is done", || async {
            sqlx::query_scalar::<_, i64>(cleaned_up).fetch_one(&broker.db).await.unwrap() == MANY as i64
        })
        .await;
    // Two replicas with one call at a time each would make two concurrent calls.
    assert!(s3.max_concurrent_calls() > 4, "{} calls at once", s3.max_concurrent_calls());
    for id in ids {
        assert_eq!(s3.count_with(Call::ListUploads, &id), 1, "S3 was asked about {id} by both replicas");
    }
}

#[tokio::test]
async fn a_slow_s3_does_not_delay_the_release_of_quota() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let aborted = broker.open(b"hello", json!({})).await.expect(201).id();
    let overdue = broker.open(b"hello", json!({})).await.expect(201).id();
    s3.delay_calls(Duration::from_secs(14));
    broker.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    broker.eventually("S3 is called", || async { s3.count_with(Call::ListUploads, &aborted) > 0 }).await;
    broker.advance_clock(EXPIRED);
    broker.eventually("the quota is released", || async { broker.tenant_usage().await == (0, 0) }).await;
    let soon = OffsetDateTime::now_utc() + EXPIRED;
    assert!(
        broker.cleanup_due(&aborted).await.unwrap() < soon,
        "the quota was released only after S3 answered for another upload"
    );
    assert_eq!(broker.upload(&overdue).await.state(), "expired");
}
