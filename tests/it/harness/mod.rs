//! `TestBroker`: one broker with a database, a bucket and a topic of its own, and the requests that tests send to it.

pub(crate) mod fault_proxy;
pub(crate) mod faults;
pub(crate) mod in_process;
pub(crate) mod process;
pub(crate) mod raw;
pub(crate) mod servers;
pub(crate) mod tokens;
pub(crate) mod uploads;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use lfs_broker::app;
use lfs_broker::kafka::Delivery;
use lfs_broker::store;
use lfs_broker::{auth, broker, completion, http, kafka, notify, objects, policy, sweeper};
use lfs_broker_client::Client;
use lfs_broker_client::api::SignedRequest;
use lfs_broker_client::checksum::Sha256;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use faults::retry_while_unavailable;
use in_process::InProcessBroker;
use servers::servers;
use uploads::is_versitygw_directory_race;

/// One broker and the database, bucket and topic that it uses.
pub(crate) struct TestBroker {
    /// The settings of the last start; a restart uses them again.
    pub(crate) settings: app::Settings,
    /// A topic that only this broker uses, with three partitions.
    pub(crate) topic: String,
    pub(crate) bucket: String,
    pub(crate) db: PgPool,
    pub(crate) s3: aws_sdk_s3::Client,
    pub(crate) http: reqwest::Client,
    running: Option<InProcessBroker>,
    /// How far the clock is ahead. A broker that is started again keeps this offset.
    clock_advance_ms: AtomicU64,
}

/// A Kafka record as a plain consumer reads it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp_ms: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Vec<u8>,
    pub(crate) headers: Vec<(String, String)>,
}

/// An HTTP response with its whole body.
#[derive(Debug)]
pub(crate) struct ApiResponse {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) json: Value,
    pub(crate) text: String,
}

impl ApiResponse {
    pub(crate) fn code(&self) -> &str {
        self.json["code"].as_str().unwrap_or_default()
    }

    pub(crate) fn state(&self) -> &str {
        self.json["state"].as_str().unwrap_or_default()
    }

    pub(crate) fn id(&self) -> String {
        self.json["id"].as_str().unwrap_or_else(|| panic!("no id in {}", self.text)).to_owned()
    }

    /// Asserts the status and returns the response.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text);
        self
    }

    /// Asserts an RFC 9457 problem with this status and code.
    #[track_caller]
    pub(crate) fn expect_problem(self, status: u16, code: &str) -> Self {
        assert_eq!((self.status, self.code()), (status, code), "{}", self.text);
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.json["status"], status);
        assert_eq!(self.json["type"], format!("/problems/{code}"));
        assert_eq!(self.json["request_id"].as_str().unwrap(), self.headers["x-request-id"].to_str().unwrap());
        for secret in servers().secrets() {
            assert!(!self.text.contains(&secret), "{secret} is in {}", self.text);
        }
        self
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::of(bytes).to_string()
}

/// Pseudorandom bytes, the same for the same seed. Compression or zero pages cannot hide a mistake in them.
pub(crate) fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

/// Parses a timestamp of a response and asserts that it is in UTC.
pub(crate) fn time(value: &Value) -> OffsetDateTime {
    let text = value.as_str().expect("a time");
    assert!(text.ends_with('Z'), "{text} is not in UTC");
    OffsetDateTime::parse(text, &Rfc3339).expect("a time of RFC 3339")
}

impl TestBroker {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts a broker with changed settings.
    pub(crate) async fn start_with(change: impl FnOnce(&mut app::Settings)) -> Self {
        let servers = servers();
        let url = servers.database().await;
        let bucket = format!("it-{}", Uuid::new_v4().simple());
        let mut settings = app::Settings {
            listen: ([127, 0, 0, 1], 0).into(),
            public_url: None,
            cors_origins: Vec::new(),
            // A machine that is busy with tests may be slow. Other tests check how soon the broker answers.
            store: store::Settings { max_connections: 8, call_timeout: Duration::from_secs(15), ..store::Settings::new(&url) },
            objects: objects::Settings {
                bucket: Some(bucket.clone()),
                endpoint: Some(servers.s3.endpoint.clone()),
                region: Some("us-east-1".into()),
                access_key_id: Some(servers.s3.access_key_id.clone()),
                secret_access_key: Some(servers.s3.secret_access_key.clone()),
                call_timeout: Some(Duration::from_secs(15)),
                ..objects::Settings::default()
            },
            kafka: kafka::Settings {
                bootstrap_servers: servers.kafka.clone(),
                properties: BTreeMap::new(),
                delivery: if servers.real_kafka { Delivery::ExactlyOnce } else { Delivery::AtLeastOnce },
                create_topics: false,
            },
            http: http::Settings::default(),
            auth: auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() },
            policy: policy::Settings { default_enabled: true, ..policy::Settings::default() },
            broker: broker::Settings { complete_wait: Duration::from_secs(20), ..broker::Settings::default() },
            completion: completion::Settings::default(),
            // A test that needs a sweep advances the clock and wakes the sweeper by an abort, or lowers this interval.
            sweeper: sweeper::Settings { interval: Duration::from_millis(200), ..sweeper::Settings::default() },
            notify: notify::Settings::default(),
        };
        change(&mut settings);
        let s3 = s3_client(&settings.objects);
        s3.create_bucket().bucket(&bucket).send().await.expect("a bucket is made");
        let running = Some(InProcessBroker::start(&settings, Duration::ZERO).await);
        let db = PgPool::connect(&url).await.unwrap();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        let topic = format!("it-{}", Uuid::new_v4().simple());
        let broker = Self { settings, topic, bucket, db, s3, http, running, clock_advance_ms: AtomicU64::new(0) };
        broker.create_topic(&broker.topic, 3).await;
        broker
    }

    /// Creates a topic in Kafka and waits until its metadata shows it.
    pub(crate) async fn create_topic(&self, topic: &str, partitions: i32) {
        servers::create_topic(topic, partitions).await;
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || {
            let consumer = consumer();
            let begun = std::time::Instant::now();
            loop {
                // Kafka may answer late on a machine that is busy with tests.
                let metadata = consumer.fetch_metadata(Some(&topic), Duration::from_secs(5));
                if metadata.as_ref().is_ok_and(|metadata| {
                    metadata.topics().iter().any(|found| found.name() == topic && found.partitions().len() == partitions as usize)
                }) {
                    return;
                }
                assert!(begun.elapsed() < Duration::from_secs(60), "topic {topic} did not appear: {:?}", metadata.err());
                std::thread::sleep(Duration::from_millis(50));
            }
        })
        .await
        .unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.running.as_ref().expect("the broker runs").address())
    }

    /// The real client.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url()).unwrap()
    }

    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> ApiResponse {
        let response = request.send().await.expect("the broker answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        ApiResponse { status, headers, json: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    /// A request to which the caller adds headers and a body.
    pub(crate) fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method.parse().unwrap(), format!("{}{path}", self.url()))
    }

    /// Sends a body unchanged, as `application/json`.
    pub(crate) async fn send_json(&self, method: &str, path: &str, body: impl Into<reqwest::Body>) -> ApiResponse {
        self.send(self.request(method, path).header("content-type", "application/json").body(body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> ApiResponse {
        self.send(self.http.get(format!("{}{path}", self.url()))).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> ApiResponse {
        self.send(self.http.post(format!("{}{path}", self.url())).json(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> ApiResponse {
        self.send(self.http.delete(format!("{}{path}", self.url()))).await
    }

    pub(crate) async fn put_policy(&self, topic: &str, policy: &Value) -> ApiResponse {
        self.send(self.http.put(format!("{}/lfs/topics/{topic}", self.url())).json(policy)).await
    }

    /// Opens an upload of these bytes to the broker's topic. `more` adds or replaces members; null removes one.
    pub(crate) async fn open(&self, content: &[u8], more: Value) -> ApiResponse {
        let mut body = json!({"topic": self.topic, "size": content.len(), "sha256": sha256(content)});
        for (name, value) in more.as_object().expect("an object") {
            match value {
                Value::Null => body.as_object_mut().unwrap().remove(name),
                value => body.as_object_mut().unwrap().insert(name.clone(), value.clone()),
            };
        }
        self.post("/lfs/uploads", &body).await
    }

    /// Sends bytes with a signed request, like a client that knows nothing else.
    pub(crate) async fn put(&self, request: &Value, content: &[u8]) -> ApiResponse {
        let mut response = self.put_once(request, content).await;
        for _ in 0..20 {
            if !is_versitygw_directory_race(response.status, &response.text) {
                break;
            }
            response = self.put_once(request, content).await;
        }
        response
    }

    async fn put_once(&self, request: &Value, content: &[u8]) -> ApiResponse {
        let signed: SignedRequest = serde_json::from_value(request.clone()).unwrap_or_else(|error| panic!("{error}: {request}"));
        let mut put = self.http.put(&signed.url).body(content.to_vec());
        for (name, value) in &signed.headers {
            // HTTP clients derive it from the body, but reqwest omits it when the body is empty.
            if name != "content-length" || content.is_empty() {
                put = put.header(name, value);
            }
        }
        self.send(put).await
    }

    /// Puts every part that a response lists.
    pub(crate) async fn put_parts(&self, parts: &Value, content: &[u8]) {
        for part in parts.as_array().expect("parts") {
            let (offset, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
            self.put(part, &content[offset..offset + size]).await.expect(200);
        }
    }

    pub(crate) async fn complete(&self, id: &str) -> ApiResponse {
        self.post(&format!("/lfs/uploads/{id}/complete"), &json!({})).await
    }

    /// Opens an upload, sends one PUT, completes it, and asserts that it was published.
    pub(crate) async fn publish(&self, content: &[u8], more: Value) -> ApiResponse {
        let opened = retry_while_unavailable(async || self.open(content, more.clone()).await).await.expect(201);
        self.put(&opened.json["upload"], content).await.expect(200);
        retry_while_unavailable(async || self.complete(&opened.id()).await).await.expect(200)
    }

    pub(crate) async fn upload(&self, id: &str) -> ApiResponse {
        self.get(&format!("/lfs/uploads/{id}")).await
    }

    /// Waits with the API's long poll until the upload is in this state.
    pub(crate) async fn wait_for_state(&self, id: &str, state: &str) -> ApiResponse {
        let deadline = Instant::now() + Duration::from_secs(150);
        let mut found = self.upload(id).await;
        while found.state() != state {
            assert!(Instant::now() < deadline, "{id} never became {state}: {}", found.text);
            found = match found.json["version"].as_i64() {
                Some(version) => self.get(&format!("/lfs/uploads/{id}?wait=5&version={version}")).await,
                // The broker is not available.
                None => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    self.upload(id).await
                }
            };
        }
        found
    }

    /// Waits up to 25 s until the condition holds, else fails the test. A lease lasts longer: what happens only after a
    /// lease has expired comes too late.
    pub(crate) async fn eventually<F: Future<Output = bool>>(&self, description: &str, mut holds: impl FnMut() -> F) {
        let deadline = Instant::now() + Duration::from_secs(25);
        while !holds().await {
            assert!(Instant::now() < deadline, "did not happen within 25 s: {description}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Advances the broker's clock.
    pub(crate) fn advance_clock(&self, duration: Duration) {
        self.clock_advance_ms.fetch_add(u64::try_from(duration.as_millis()).unwrap(), Ordering::Relaxed);
        self.running.as_ref().expect("the broker runs").advance_clock(duration);
    }

    /// How far the broker's clock is ahead.
    pub(crate) fn clock_advance(&self) -> Duration {
        Duration::from_millis(self.clock_advance_ms.load(Ordering::Relaxed))
    }

    /// Every committed record of a topic, by partition and offset, read by a plain consumer.
    pub(crate) async fn records(&self, topic: &str) -> Vec<Record> {
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || read_all(&topic)).await.unwrap()
    }

    /// The keys of all objects in the bucket.
    pub(crate) async fn objects(&self) -> Vec<String> {
        let page = self.s3.list_objects_v2().bucket(&self.bucket).send().await.unwrap();
        page.contents().iter().filter_map(|object| object.key().map(str::to_owned)).collect()
    }

    /// Whether S3 knows an open multipart upload for this object's key.
    pub(crate) async fn has_open_multipart(&self, object_key: &str) -> bool {
        let page = self.s3.list_multipart_uploads().bucket(&self.bucket).prefix(object_key).send().await.unwrap();
        !page.uploads().is_empty()
    }

    /// Shuts the broker down in order and starts it again with changed settings.
    pub(crate) async fn restart(&mut self, change: impl FnOnce(&mut app::Settings)) {
        self.running.take().expect("the broker runs").stop().await;
        self.start_again(change).await;
    }

    /// Drops the broker like a crash and starts it again with changed settings.
    pub(crate) async fn crash(&mut self, change: impl FnOnce(&mut app::Settings)) {
        self.running.take().expect("the broker runs").crash();
        self.start_again(change).await;
    }

    pub(crate) async fn start_again(&mut self, change: impl FnOnce(&mut app::Settings)) {
        change(&mut self.settings);
        self.running = Some(InProcessBroker::start(&self.settings, self.clock_advance()).await);
    }

    /// Shuts the broker down in order. It stays down until [`TestBroker::start_again`].
    pub(crate) async fn stop(&mut self) {
        self.running.take().expect("the broker runs").stop().await;
    }

    /// Starts a second replica on the same database, S3 and Kafka.
    pub(crate) async fn replica(&self) -> InProcessBroker {
        InProcessBroker::start(&self.settings, self.clock_advance()).await
    }
}

fn s3_client(settings: &objects::Settings) -> aws_sdk_s3::Client {
    let credentials = Credentials::new(
        settings.access_key_id.clone().unwrap(),
        settings.secret_access_key.clone().unwrap(),
        None,
        None,
        "tests",
    );
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(settings.public_endpoint.clone().or(settings.endpoint.clone()).unwrap())
        .region(Region::new("us-east-1"))
        .credentials_provider(credentials)
        .force_path_style(true)
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

fn consumer() -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", &servers().kafka)
        .set("group.id", "it")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        // Kafka reports the end of a partition when a fetch comes back empty, by default after half a second.
        .set("fetch.wait.max.ms", "10")
        .create()
        .expect("a consumer is made")
}

fn read_all(topic: &str) -> Vec<Record> {
    let consumer = consumer();
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10)).expect("Kafka answers");
    let partitions: Vec<i32> = metadata.topics()[0].partitions().iter().map(|partition| partition.id()).collect();
    let mut assignment = TopicPartitionList::new();
    for partition in &partitions {
        assignment.add_partition_offset(topic, *partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let (mut records, mut partitions_read) = (Vec::new(), 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while partitions_read < partitions.len() {
        assert!(Instant::now() < deadline, "{topic} was not read in a minute");
        match consumer.poll(Duration::from_secs(10)).expect("Kafka answers in time") {
            Err(rdkafka::error::KafkaError::PartitionEOF(_)) => partitions_read += 1,
            // On a busy machine a connection may be slow; librdkafka reconnects by itself.
            Err(error) if matches!(error.rdkafka_error_code(), Some(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => panic!("{error}"),
            Ok(message) => records.push(Record {
                partition: message.partition(),
                offset: message.offset(),
                timestamp_ms: message.timestamp().to_millis().expect("a record has a time"),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().unwrap_or_default().to_vec(),
                headers: message.headers().map_or_else(Vec::new, |headers| {
                    headers
                        .iter()
                        .map(|h| (h.key.to_owned(), String::from_utf8_lossy(h.value.unwrap_or_default()).into_owned()))
                        .collect()
                }),
            }),
        }
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}
