//! A failpoint between every two side effects, in a real process: the broker is killed, gets an error, or pauses there. In
//! each case a client that retries gets its upload published once, and no object, upload or quota is left over.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::audit::assert_clean;
use crate::harness::faults::{retry_while_unavailable, upload_id_of};
use crate::harness::process::BrokerProcess;
use crate::harness::uploads::{PART_BYTES, part_hashes};
use crate::harness::{ApiResponse, TestBroker, bytes, sha256};

/// The process is killed; the last call fails as if its response was lost; the process pauses for longer than a lease.
const ACTIONS: [&str; 3] = ["kill", "error", "4000"];

/// Longer than the leases of a dead replica.
const AFTER_LEASE: Duration = Duration::from_secs(31);

/// A client that retries like real clients, and the broker process with the failpoint.
struct FailpointRun {
    broker: TestBroker,
    /// None once the process has exited; then the test broker is running in its place.
    process: Option<BrokerProcess>,
    action: &'static str,
    point: &'static str,
}

impl FailpointRun {
    /// `before` is prepended to the failpoint's action, or sets another failpoint first.
    async fn new(point: &'static str, action: &'static str, before: &str, more: &[(&str, &str)]) -> Self {
        let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_secs(5)).await;
        broker.stop().await;
        let failpoints = format!("{before}1*return({action})");
        let failpoints = if failpoints.contains('=') { failpoints } else { format!("{point}={failpoints}") };
        let environment: Vec<(&str, &str)> = [("FAILPOINTS", failpoints.as_str())].iter().chain(more).copied().collect();
        let process = Some(broker.spawn_process(&environment).await);
        Self { broker, process, action, point }
    }

    /// Sends the request until it gets a response below 500. A process that has exited is replaced.
    async fn request(&mut self, method: &str, path: &str, body: &Value) -> ApiResponse {
        for _ in 0..60 {
            let url = self.process.as_ref().map_or_else(|| self.broker.url(), |process| process.url().to_owned());
            let request = self.broker.http.request(method.parse().unwrap(), format!("{url}{path}"));
            let request = request.header("idempotency-key", "one").json(body);
            match request.send().await {
                Ok(response) if response.status().as_u16() < 500 => {
                    let (status, headers) = (response.status().as_u16(), response.headers().clone());
                    // The process may be killed between the response's head and its body.
                    if let Ok(text) = response.text().await {
                        return ApiResponse { status, headers, json: serde_json::from_str(&text).unwrap_or(Value::Null), text };
                    }
                }
                Ok(_) => {}
                Err(_) => self.replace_if_exited().await,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{} of {}: {method} {path} was never answered\n{}", self.action, self.point, self.log());
    }

    async fn replace_if_exited(&mut self) {
        let Some(process) = &mut self.process else { return };
        if process.has_exited().await {
            self.assert_failpoint_reached().await;
            self.process = None;
            // The test broker takes over when the dead process's leases have expired; the clock is advanced to save time.
            self.broker.start_again(|_| {}).await;
            self.broker.advance_clock(AFTER_LEASE);
        }
    }

    fn log(&self) -> String {
        self.process.as_ref().map_or_else(String::new, BrokerProcess::log)
    }

    /// Asserts that the failpoint was reached; otherwise the test shows nothing.
    async fn assert_failpoint_reached(&self) {
        if let Some(process) = &self.process {
            process.wait_for_log(&format!("reached failpoint {}: {}", self.point, self.action)).await;
        }
    }

    async fn open(&mut self, content: &[u8], more: &Value) -> ApiResponse {
        let mut body = json!({"topic": self.broker.topic, "size": content.len(), "sha256": sha256(content), "key": "k"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let opened = self.request("POST", "/lfs/uploads", &body).await;
        assert!([200, 201].contains(&opened.status), "{}", opened.text);
        opened
    }

    /// Completes until the upload is published.
    async fn complete(&mut self, id: &str) -> ApiResponse {
        for _ in 0..60 {
            let response = self.request("POST", &format!("/lfs/uploads/{id}/complete"), &json!({})).await;
            match response.status {
                200 => return response,
                202 => self.replace_if_exited().await,
                _ => panic!("{} of {}: {}\n{}", self.action, self.point, response.text, self.log()),
            }
        }
        panic!("{} of {}: {id} was never published\n{}", self.action, self.point, self.log());
    }

    /// Kills the process, if it still runs, and starts the test broker in its place.
    async fn replace_process(&mut self) {
        if let Some(process) = self.process.take() {
            assert_ne!(self.action, "kill", "the process still runs:\n{}", process.log());
            drop(process);
            self.broker.start_again(|_| {}).await;
            self.broker.advance_clock(AFTER_LEASE);
        }
    }

    /// Asserts one upload, one pointer, a repeatable response, the right bytes, and no other object or session.
    async fn assert_published_once(&mut self, opened: &ApiResponse, done: &ApiResponse, content: &[u8]) {
        let case = format!("{} of {}", self.action, self.point);
        self.assert_failpoint_reached().await;
        self.replace_process().await;
        let broker = &self.broker;
        assert_eq!(broker.complete(&opened.id()).await.expect(200).json, done.json, "{case}");
        let records = broker.distinct_records().await;
        assert_eq!(records.iter().map(upload_id_of).collect::<Vec<_>>(), [opened.id()], "{case}");
        let resolved = broker.resolve(&records[0].value, "").await.expect(200);
        assert!(broker.download(&resolved.json).await == content, "{case}");
        let sessions: (i64,) = sqlx::query_as("select count(*) from upload_sessions").fetch_one(&broker.db).await.unwrap();
        assert_eq!((sessions.0, broker.tenant_usage().await), (1, (0, 0)), "{case}");
        // A broker that has just started has a probe object for a moment.
        let object_key = opened.json["object_key"].as_str().unwrap();
        broker.eventually(&format!("{case}: no other object"), || async { broker.objects().await == [object_key] }).await;
        if broker.is_exactly_once() {
            assert_clean(broker).await;
        }
    }
}

/// Uploads in parts through a broker with this failpoint.
async fn upload_with_failpoint(point: &'static str, before: &str, more: &Value) {
    join_all(ACTIONS.map(|action| async move {
        let content = bytes(PART_BYTES + 9, 1);
        let mut run = FailpointRun::new(point, action, before, &[]).await;
        let opened = run.open(&content, more).await;
        run.broker.put_parts(&opened.json["parts"], &content).await;
        let done = run.complete(&opened.id()).await;
        // A failure after the pointer was enqueued may show only after the response.
        run.replace_if_exited().await;
        run.assert_published_once(&opened, &done, &content).await;
    }))
    .await;
}

/// Uploads with the hash of every part, so that the broker need not read the bytes back.
async fn hashed_upload_with_failpoint(point: &'static str, before: &str) {
    let hashes = part_hashes(&bytes(PART_BYTES + 9, 1), PART_BYTES);
    upload_with_failpoint(point, before, &json!({"part_size": PART_BYTES, "part_sha256": hashes})).await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_session_is_stored() {
    hashed_upload_with_failpoint("open.stored", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_s3_creates_the_multipart_upload() {
    hashed_upload_with_failpoint("s3.begun", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_before_open_is_answered() {
    hashed_upload_with_failpoint("open.answered", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_completion_is_claimed() {
    hashed_upload_with_failpoint("saved.completing", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_s3_joins_the_parts() {
    hashed_upload_with_failpoint("s3.joined", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_object_is_verified() {
    hashed_upload_with_failpoint("complete.checked", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_bytes_are_read_back() {
    upload_with_failpoint("complete.checked", "1*off->", &json!({"part_size": PART_BYTES})).await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_pointer_is_enqueued() {
    hashed_upload_with_failpoint("saved.verified", "").await;
}

/// Uploads by a single PUT through a broker with this failpoint: its completion has no claim.
async fn single_put_with_failpoint(point: &'static str) {
    join_all(ACTIONS.map(|action| async move {
        let mut run = FailpointRun::new(point, action, "", &[]).await;
        let opened = run.open(b"hello", &json!({})).await;
        run.broker.put(&opened.json["upload"], b"hello").await.expect(200);
        let done = run.complete(&opened.id()).await;
        run.replace_if_exited().await;
        run.assert_published_once(&opened, &done, b"hello").await;
    }))
    .await;
}

#[tokio::test]
async fn a_single_put_survives_a_failure_after_its_object_is_found_without_a_claim() {
    single_put_with_failpoint("complete.checked").await;
}

#[tokio::test]
async fn a_single_put_survives_a_failure_after_it_is_saved_without_a_claim() {
    single_put_with_failpoint("saved.verified").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_the_previous_owner_is_fenced() {
    hashed_upload_with_failpoint("relay.fenced", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_batch_is_claimed() {
    hashed_upload_with_failpoint("relay.claimed", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_a_dead_owners_batch_is_resolved() {
    hashed_upload_with_failpoint("relay.recovered", "relay.claimed=1*return(error);relay.recovered=").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_record_and_its_marker_are_sent() {
    hashed_upload_with_failpoint("relay.sent", "").await;
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn an_upload_survives_a_failure_after_kafka_commits() {
    hashed_upload_with_failpoint("relay.committed", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_its_pointer_is_marked_published() {
    hashed_upload_with_failpoint("relay.marked", "").await;
}

#[tokio::test]
async fn an_upload_survives_a_failure_after_it_is_reopened_for_missing_bytes() {
    join_all(ACTIONS.map(|action| async move {
        let mut run = FailpointRun::new("saved.open", action, "", &[]).await;
        let opened = run.open(b"hello", &json!({})).await;
        let path = format!("/lfs/uploads/{}/complete", opened.id());
        run.request("POST", &path, &json!({})).await.expect_problem(409, "object-missing");
        run.broker.put(&opened.json["upload"], b"hello").await.expect(200);
        let done = run.complete(&opened.id()).await;
        run.assert_published_once(&opened, &done, b"hello").await;
    }))
    .await;
}

/// How an upload ends without a pointer.
#[derive(Clone, Copy)]
enum End {
    Aborted,
    Rejected,
    Expired,
}

/// Ends an upload that has one part in S3, through a broker with this failpoint.
async fn end_with_failpoint(point: &'static str, end: End) {
    join_all(ACTIONS.map(|action| async move {
        let expires = if matches!(end, End::Expired) { "5" } else { "3600" };
        let mut run = FailpointRun::new(point, action, "", &[("LFS_BROKER_SESSION_SECONDS", expires)]).await;
        let content = bytes(PART_BYTES + 9, 1);
        let opened = run.open(&content, &json!({"part_size": PART_BYTES})).await;
        let (path, object_key) = (format!("/lfs/uploads/{}", opened.id()), opened.json["object_key"].as_str().unwrap());
        run.broker.put(&opened.json["parts"][0], &content[..PART_BYTES]).await.expect(200);
        let state = match end {
            End::Aborted => {
                run.request("DELETE", &path, &json!({})).await.expect(204);
                "aborted"
            }
            End::Rejected => {
                run.broker.put_object(object_key, b"of another writer", None).await;
                let abort = run.broker.s3.abort_multipart_upload().bucket(&run.broker.bucket).key(object_key);
                let listed = run.broker.s3.list_multipart_uploads().bucket(&run.broker.bucket).send().await.unwrap();
                abort.upload_id(listed.uploads()[0].upload_id().unwrap()).send().await.unwrap();
                let refused = run.request("POST", &format!("{path}/complete"), &json!({})).await;
                refused.expect_problem(422, "object-foreign");
                "rejected"
            }
            End::Expired => {
                for _ in 0..60 {
                    if run.request("GET", &path, &json!({})).await.state() == "expired" {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                "expired"
            }
        };
        if action == "kill" {
            // The sweeper reaches the failpoint later.
            for _ in 0..100 {
                run.replace_if_exited().await;
            }
        }
        run.assert_failpoint_reached().await;
        run.replace_process().await;
        run.broker.wait_for_state(&opened.id(), state).await;
        run.broker.wait_until_s3_is_empty(object_key).await;
        assert_eq!(run.broker.tenant_usage().await, (0, 0));
        assert_eq!(run.broker.records(&run.broker.topic).await.len(), 0);
        // After the second cleanup no further cleanup is due.
        run.broker.advance_clock(Duration::from_secs(7300));
        let due = "select count(*) from upload_sessions where cleanup_due_at is not null";
        let broker = &run.broker;
        broker
            .eventually("the second cleanup is done", || async {
                let due: (i64,) = sqlx::query_as(due).fetch_one(&broker.db).await.unwrap();
                due.0 == 0
            })
            .await;
        assert_clean(broker).await;
    }))
    .await;
}

#[tokio::test]
async fn an_upload_that_is_aborted_leaves_nothing_after_a_failure() {
    end_with_failpoint("saved.aborted", End::Aborted).await;
}

#[tokio::test]
async fn an_upload_that_is_rejected_leaves_nothing_after_a_failure() {
    end_with_failpoint("saved.rejected", End::Rejected).await;
}

#[tokio::test]
async fn an_upload_that_expires_leaves_nothing_after_a_failure() {
    end_with_failpoint("saved.expired", End::Expired).await;
}

#[tokio::test]
async fn an_aborted_upload_leaves_nothing_after_a_failure_of_the_cleanup() {
    end_with_failpoint("sweep.removed", End::Aborted).await;
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_relay_that_was_paused_in_the_middle_of_a_batch_is_fenced() {
    let mut broker = TestBroker::start().await;
    assert!(broker.is_exactly_once(), "only transactions can fence a producer");
    broker.stop().await;
    // The client's request waits longer than the process is paused.
    let zombie =
        broker.spawn_process(&[("FAILPOINTS", "relay.sent=1*return(1000)"), ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "45")]).await;
    let opened = broker.http.post(format!("{}/lfs/uploads", zombie.url()));
    let body = json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k"});
    let opened = broker.send(opened.json(&body)).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let complete = broker.http.post(format!("{}/lfs/uploads/{}/complete", zombie.url(), opened.id()));
    let response = tokio::spawn(complete.send());
    zombie.wait_for_log("reached failpoint relay.sent: 1000").await;
    zombie.signal("STOP");
    // The paused process holds its leases, and a transaction with a record in it, until they expire.
    broker.start_again(|_| {}).await;
    broker.wait_for_state(&opened.id(), "published").await;
    zombie.signal("CONT");
    zombie.wait_for_log("was taken").await;
    assert!(
        response.await.unwrap().is_ok_and(|response| response.status() == 200),
        "the paused process answers with the other broker's result"
    );
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
    assert_clean(&broker).await;
}

#[tokio::test]
async fn a_shard_that_hangs_delays_no_other_shard() {
    let mut broker = TestBroker::start().await;
    broker.log_outbox_inserts().await;
    broker.stop().await;
    let process = broker.spawn_process(&[("FAILPOINTS", "relay.claimed=1*return(20000)")]).await;
    let mut opened = Vec::new();
    for number in 0..12 {
        let body = json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello"), "key": format!("k{number}")});
        let open = || broker.http.post(format!("{}/lfs/uploads", process.url())).json(&body);
        let response = retry_while_unavailable(async || broker.send(open()).await).await.expect(201);
        broker.put(&response.json["upload"], b"hello").await.expect(200);
        opened.push(response.id());
    }
    let complete = |id: &str| broker.send(broker.http.post(format!("{}/lfs/uploads/{id}/complete", process.url())));
    let first = complete(&opened[0]);
    let epochs = || async {
        let epochs: Vec<(i64,)> =
            sqlx::query_as("select epoch from relay_shards order by shard").fetch_all(&broker.db).await.unwrap();
        epochs
    };
    let (before, first) = tokio::join!(
        async {
            process.wait_for_log("reached failpoint relay.claimed").await;
            let before = epochs().await;
            let begun = std::time::Instant::now();
            join_all(opened[1..].iter().map(|id| complete(id))).await;
            let shard: (i32,) =
                sqlx::query_as("select shard from outbox where batch is not null").fetch_one(&broker.db).await.unwrap();
            let others = "select count(*), count(*) filter (where state = 'published') from outbox_log
                 join upload_sessions on id = session_id where outbox_log.shard <> $1";
            broker
                .eventually("every pointer of the other shards is published", || async {
                    let (all, published): (i64, i64) = sqlx::query_as(others).bind(shard.0).fetch_one(&broker.db).await.unwrap();
                    assert!(all > 0);
                    all == published
                })
                .await;
            // The failpoint ends after 20 s, and a shard that waited for it would publish after that.
            let elapsed = begun.elapsed();
            assert!(elapsed < Duration::from_secs(20), "the other shards waited {elapsed:?}");
            before
        },
        first
    );
    first.expect(202);
    // The other shards' leases were not lost and acquired again under the next epoch.
    assert_eq!(epochs().await, before);
    for id in &opened {
        while complete(id).await.status == 202 {}
    }
    assert_eq!(broker.distinct_records().await.len(), 12);
}
