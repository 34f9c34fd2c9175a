//! Faults that a test injects around a broker, and what the test reads from its database and Kafka.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lfs_broker::app;
use serde_json::Value;
use uuid::Uuid;

use super::fault_proxy::FaultProxy;
use super::servers::servers;
use super::{ApiResponse, Record, TestBroker};

/// An answer without a dependency is due within 2 s. A request that waits for two timeouts takes at least 3.4 s.
const MAX_WAIT: Duration = Duration::from_millis(3300);

/// A proxy in front of the S3 server.
pub(crate) async fn proxy_to_s3() -> FaultProxy {
    FaultProxy::to(servers().s3.endpoint.trim_start_matches("http://")).await
}

/// A test broker whose clients reach S3 through a proxy. The broker itself connects to S3 directly.
pub(crate) async fn start_with_client_s3_proxy(change: impl FnOnce(&mut app::Settings)) -> (TestBroker, FaultProxy) {
    let proxy = proxy_to_s3().await;
    let endpoint = format!("http://{}", proxy.address());
    let broker = TestBroker::start_with(|settings| {
        settings.objects.public_endpoint = Some(endpoint);
        change(settings);
    })
    .await;
    (broker, proxy)
}

/// A proxy in front of PostgreSQL.
pub(crate) async fn proxy_to_database() -> FaultProxy {
    let [_, _, _, database] = servers().secrets();
    FaultProxy::to(&database).await
}

/// The id of the upload that a record belongs to.
pub(crate) fn upload_id_of(record: &Record) -> String {
    record.header("lfs-upload-id").expect("a record of ours").to_owned()
}

/// Sends a request and asserts that the broker soon refuses it with 503 and a `Retry-After`.
///
/// A busy machine may delay one answer. A broker that waits too long delays each of five.
pub(crate) async fn expect_quick_refusal(request: impl AsyncFn() -> ApiResponse, codes: &[&str]) -> ApiResponse {
    let mut times = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        let response = request().await;
        times.push(begun.elapsed());
        assert!(codes.contains(&response.code()), "{}: {}", response.status, response.text);
        let code = response.code().to_owned();
        let response = response.expect_problem(503, &code);
        assert!(response.headers.contains_key("retry-after") && response.json["retryable"] == true, "{}", response.text);
        if times.last().is_some_and(|time| *time < MAX_WAIT) {
            return response;
        }
    }
    panic!("none of five answers came within {MAX_WAIT:?}: {times:?}");
}

/// Sends a request again for as long as the broker answers 503 and calls that retryable, as a client does.
pub(crate) async fn retry_while_unavailable(request: impl AsyncFn() -> ApiResponse) -> ApiResponse {
    for _ in 0..60 {
        let response = request().await;
        if response.status != 503 || response.json["retryable"] != true {
            return response;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    panic!("the broker stays unavailable");
}

impl TestBroker {
    /// Whether committed records contain each pointer exactly once.
    pub(crate) fn is_exactly_once(&self) -> bool {
        self.settings.kafka.delivery == lfs_broker::kafka::Delivery::ExactlyOnce
    }

    /// The records of the broker's topic, one per upload. Without transactions a broker that was killed may have sent
    /// the same record twice, byte for byte.
    pub(crate) async fn distinct_records(&self) -> Vec<Record> {
        let mut first: BTreeMap<String, Record> = BTreeMap::new();
        let mut distinct = Vec::new();
        for record in self.records(&self.topic).await {
            let id = upload_id_of(&record);
            match first.get(&id) {
                None => {
                    first.insert(id, record.clone());
                    distinct.push(record);
                }
                Some(sent) => {
                    assert!(!self.is_exactly_once(), "{id} is in Kafka twice");
                    assert_eq!((&sent.key, &sent.value, &sent.headers), (&record.key, &record.value, &record.headers));
                }
            }
        }
        distinct
    }

    /// Gives the session's completion lease to a replica that does not exist; the lease ends after 30 seconds.
    pub(crate) async fn lease_to_dead_replica(&self, id: &str) {
        let leased = sqlx::query(
            "update upload_sessions set state = 'completing', lease_owner = gen_random_uuid(), lease_attempt = 1,
                 lease_until = clock_timestamp() + interval '30 seconds', version = version + 1 where id = $1",
        );
        let updated = leased.bind(id.parse::<Uuid>().unwrap()).execute(&self.db).await.unwrap();
        assert_eq!(updated.rows_affected(), 1);
    }

    /// Copies every inserted outbox row into a log table, because the relay deletes published rows.
    pub(crate) async fn log_outbox_inserts(&self) {
        let log = "create table outbox_log (like outbox);
             create function log_outbox() returns trigger language plpgsql as
                 $$ begin insert into outbox_log select new.*; return null; end $$;
             create trigger log_outbox after insert on outbox for each row execute function log_outbox();";
        sqlx::raw_sql(log).execute(&self.db).await.unwrap();
    }

    /// The outbox number of each upload's pointer, by upload id.
    pub(crate) async fn outbox_numbers(&self) -> BTreeMap<String, i64> {
        let rows: Vec<(Uuid, i64)> =
            sqlx::query_as("select session_id, number from outbox_log").fetch_all(&self.db).await.unwrap();
        rows.into_iter().map(|(id, number)| (id.to_string(), number)).collect()
    }

    /// Asserts that each key's records are in the order of their outbox numbers.
    pub(crate) fn assert_key_order(records: &[Record], outbox_numbers: &BTreeMap<String, i64>) {
        let mut last: BTreeMap<Vec<u8>, (i32, i64)> = BTreeMap::new();
        for record in records {
            let number = outbox_numbers[&upload_id_of(record)];
            let key = record.key.clone().expect("a record with a key");
            if let Some((partition, before)) = last.insert(key.clone(), (record.partition, number)) {
                assert_eq!(partition, record.partition, "{key:?} is in two partitions");
                assert!(before < number, "{key:?}: outbox number {number} comes after {before}");
            }
        }
    }

    /// The tenant's quota usage: open sessions and reserved bytes.
    pub(crate) async fn tenant_usage(&self) -> (i64, i64) {
        let usage = sqlx::query_as("select open_sessions, reserved_bytes from tenants where tenant = 'default'");
        usage.fetch_one(&self.db).await.unwrap()
    }

    /// Completes like a client that retries for as long as the broker answers "retry".
    pub(crate) async fn complete_with_retries(&self, id: &str) -> ApiResponse {
        for _ in 0..60 {
            let response = self.complete(id).await;
            match response.status {
                200 => return response,
                202 | 503 => tokio::time::sleep(Duration::from_millis(250)).await,
                _ => panic!("{}", response.text),
            }
        }
        panic!("{id} never ended: {}", self.upload(id).await.text);
    }

    /// Completes until the object is verified, where the pointer cannot reach Kafka or `complete_wait` is short. On a busy
    /// machine the first answers may be 503, or 202 without a pointer.
    pub(crate) async fn complete_until_verified(&self, id: &str) -> ApiResponse {
        for _ in 0..240 {
            let response = retry_while_unavailable(async || self.complete(id).await).await;
            match (response.status, response.state()) {
                (202, "completing") => tokio::time::sleep(Duration::from_millis(100)).await,
                (202, "verified") | (200, "published") => return response,
                _ => panic!("{}", response.text),
            }
        }
        panic!("{id} is not verified: {}", self.upload(id).await.text);
    }

    /// Completes, and asserts that complete's own limit, the wait and less than a second, ends the request. Without that
    /// limit the answer would come after `unlimited`, when the timeout or lease that complete waits for has ended.
    pub(crate) async fn complete_in_time(&self, id: &str, unlimited: Duration) -> ApiResponse {
        let begun = Instant::now();
        let response = self.complete(id).await;
        let (took, wait) = (begun.elapsed(), self.settings.broker.complete_wait);
        let text = &response.text;
        assert!(took < unlimited / 3 * 2, "{took:?} with a wait of {wait:?}; without a limit it is {unlimited:?}: {text}");
        response
    }

    /// How many of the broker's PostgreSQL connections meet a condition.
    pub(crate) async fn backends(&self, condition: &str) -> i64 {
        let count = format!(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'lfs-broker' and {condition}"
        );
        sqlx::query_scalar(sqlx::AssertSqlSafe(count)).fetch_one(&self.db).await.unwrap()
    }

    /// Opens an upload and puts its bytes, so that it can be completed.
    pub(crate) async fn open_and_put(&self, content: &[u8], more: Value) -> ApiResponse {
        let opened = retry_while_unavailable(async || self.open(content, more.clone()).await).await.expect(201);
        match opened.json["mode"].as_str() {
            Some("single") => drop(self.put(&opened.json["upload"], content).await.expect(200)),
            _ => self.put_parts(&opened.json["parts"], content).await,
        }
        opened
    }
}
