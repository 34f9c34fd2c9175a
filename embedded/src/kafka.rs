//! The embedded Kafka: librdkafka's mock cluster. Clients based on librdkafka can produce to it and consume from it.
//!
//! It keeps the newest 5 MB of a partition in memory. It accepts transactions without their guarantees: aborted records
//! stay visible. So `dev` delivers at least once, and restores published records from the session table when it starts.
//!
//! The mock cluster chooses its own port. [`Server::start_on_port`] puts a proxy in front of it, because clients that
//! survive a restart of `dev` connect to the port that they know.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{DefaultProducerContext, FutureProducer, FutureRecord};
use tokio::sync::oneshot;

mod proxy;

use proxy::Proxy;

/// The header of a record that only fills a missing offset. The record has neither key nor value.
pub const GAP_HEADER: &str = "lfs-dev-gap";

/// The number of partitions that the mock cluster gives a topic on first use.
pub const NEW_TOPIC_PARTITIONS: i32 = 4;

/// The most consecutive missing offsets that are filled. Partitions with more missing offsets do not occur in
/// development.
const MAX_GAP_RECORDS: i64 = 1_000_000;

/// How many records are sent before their deliveries are awaited. librdkafka's queue holds 100,000.
const RESTORE_BATCH_RECORDS: usize = 10_000;

/// The request timeout. The server runs in this process, so it answers within milliseconds or not at all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// An error of the embedded Kafka.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The thread of the mock cluster has ended.
    #[error("the embedded kafka has stopped")]
    Stopped,
    /// librdkafka returned an error.
    #[error("embedded kafka: {0}")]
    Kafka(#[from] KafkaError),
    /// The server cannot listen on the port.
    #[error("the embedded kafka cannot listen on 127.0.0.1:{port}: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A record's offset is below the end of the partition. Records must be restored before any other record is
    /// published, in the order of their offsets.
    #[error("cannot restore offset {offset} of {topic}/{partition}: the next offset is already {next}")]
    OffsetConflict {
        /// The topic.
        topic: String,
        /// Its partition.
        partition: i32,
        /// The record's offset.
        offset: i64,
        /// The next offset of the partition.
        next: i64,
    },
    /// Too many offsets are missing between the partition's end and the record.
    #[error(
        "cannot restore offset {offset} of {topic}/{partition}: the next offset is {next}, and at most {MAX_GAP_RECORDS} missing offsets are filled"
    )]
    GapTooLarge {
        /// The topic.
        topic: String,
        /// Its partition.
        partition: i32,
        /// The record's offset.
        offset: i64,
        /// The next offset of the partition.
        next: i64,
    },
}

/// A record that was published before the embedded Kafka was restarted.
#[derive(Debug, Clone)]
pub struct SavedRecord {
    /// Its offset.
    pub offset: i64,
    /// Its timestamp in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Its key. An empty key is a key, and `None` is a record without a key.
    pub key: Option<Vec<u8>>,
    /// Its value.
    pub value: Vec<u8>,
    /// Its headers, in this order.
    pub headers: Vec<(String, Vec<u8>)>,
}

type Cluster = MockCluster<'static, DefaultProducerContext>;
type Command = Box<dyn FnOnce(&Cluster) + Send>;

/// A running embedded Kafka. It stops when it is dropped.
pub struct Server {
    /// The address of the mock cluster.
    cluster: String,
    proxy: Option<Proxy>,
    commands: mpsc::Sender<Command>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts the server on a free port of 127.0.0.1.
    pub fn start() -> Result<Self, Error> {
        let (commands, received) = mpsc::channel::<Command>();
        let (started, starting) = mpsc::channel();
        // The cluster can be used only on the thread that created it.
        let thread = std::thread::spawn(move || match MockCluster::new(1) {
            Ok(cluster) => {
                // The receiver may already be dropped. Then `received` ends at once.
                drop(started.send(Ok(cluster.bootstrap_servers())));
                received.iter().for_each(|command| command(&cluster));
            }
            Err(error) => drop(started.send(Err(error))),
        });
        let cluster = starting.recv().map_err(|_| Error::Stopped)??;
        Ok(Self { cluster, proxy: None, commands, thread: Some(thread) })
    }

    /// Starts the server on a port of 127.0.0.1, or on a free port if `port` is 0. All responses name this port.
    pub async fn start_on_port(port: u16) -> Result<Self, Error> {
        let failed = |source| Error::Listen { port, source };
        let mut server = Self::start()?;
        let cluster = server.cluster.parse().map_err(|error| failed(io::Error::other(error)))?;
        server.proxy = Some(Proxy::start(port, cluster).await.map_err(failed)?);
        Ok(server)
    }

    /// `127.0.0.1:PORT`
    pub fn bootstrap_servers(&self) -> String {
        self.proxy.as_ref().map_or_else(|| self.cluster.clone(), |proxy| proxy.address().to_string())
    }

    /// The port of [`Server::bootstrap_servers`], if the server was started on a port.
    pub fn port(&self) -> Option<u16> {
        self.proxy.as_ref().map(|proxy| proxy.address().port())
    }

    /// Creates a topic. An existing topic is not changed.
    pub async fn create_topic(&self, name: &str, partitions: i32) -> Result<(), Error> {
        let name = name.to_owned();
        match self.run(move |cluster| cluster.create_topic(&name, partitions, 1)).await {
            Err(Error::Kafka(KafkaError::MockCluster(RDKafkaErrorCode::TopicAlreadyExists))) => Ok(()),
            created => created,
        }
    }

    /// Restores records at their offsets, which must be ascending. Each missing offset between them gets a record without
    /// a value and with the header [`GAP_HEADER`]. A missing topic is created with four partitions.
    pub async fn restore(&self, topic: &str, partition: i32, records: Vec<SavedRecord>) -> Result<(), Error> {
        self.create_topic(topic, NEW_TOPIC_PARTITIONS).await?;
        let producer = self.client().create::<FutureProducer>()?;
        let mut next = self.end_offset(topic, partition).await?;
        let mut deliveries = Vec::new();
        for saved in records {
            let (topic, offset) = (topic.to_owned(), saved.offset);
            if offset < next {
                return Err(Error::OffsetConflict { topic, partition, offset, next });
            }
            if offset - next > MAX_GAP_RECORDS {
                return Err(Error::GapTooLarge { topic, partition, offset, next });
            }
            for _ in next..offset {
                let header = OwnedHeaders::new().insert(Header { key: GAP_HEADER, value: Some("") });
                let gap = FutureRecord::<(), ()>::to(&topic).partition(partition).headers(header);
                deliveries.push(producer.send_result(gap.timestamp(saved.timestamp_ms)).map_err(|(error, _)| error)?);
                await_deliveries(&mut deliveries, RESTORE_BATCH_RECORDS).await?;
            }
            let headers = saved
                .headers
                .iter()
                .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
            let record = FutureRecord {
                topic: &topic,
                partition: Some(partition),
                payload: Some(&saved.value),
                key: saved.key.as_ref(),
                timestamp: Some(saved.timestamp_ms),
                headers: Some(headers),
            };
            deliveries.push(producer.send_result(record).map_err(|(error, _)| error)?);
            await_deliveries(&mut deliveries, RESTORE_BATCH_RECORDS).await?;
            next = offset + 1;
        }
        await_deliveries(&mut deliveries, 1).await
    }

    /// Closes all connections and refuses new ones, like a stopped Kafka. The records are kept.
    pub async fn down(&self) -> Result<(), Error> {
        self.run(|cluster| cluster.broker_down(-1)).await
    }

    /// Accepts connections again after [`Server::down`].
    pub async fn up(&self) -> Result<(), Error> {
        self.run(|cluster| cluster.broker_up(-1)).await
    }

    /// Removes a partition's leader, as when its only replica is down, or gives the partition a leader again.
    pub async fn set_leader(&self, topic: &str, partition: i32, has_leader: bool) -> Result<(), Error> {
        let topic = topic.to_owned();
        self.run(move |cluster| cluster.partition_leader(&topic, partition, has_leader.then_some(1))).await
    }

    /// Denies all clients a topic, as a Kafka with ACLs does, or allows it again.
    pub async fn refuse_topic(&self, topic: &str, refused: bool) -> Result<(), Error> {
        use rdkafka::types::RDKafkaRespErr::{RD_KAFKA_RESP_ERR_NO_ERROR, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED};
        let error = if refused { RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED } else { RD_KAFKA_RESP_ERR_NO_ERROR };
        let topic = topic.to_owned();
        self.run(move |cluster| cluster.topic_error(&topic, error)).await
    }

    /// Stops the server. Its records are lost.
    pub fn stop(self) {
        drop(self);
    }

    async fn run<F>(&self, command: F) -> Result<(), Error>
    where
        F: FnOnce(&Cluster) -> Result<(), KafkaError> + Send + 'static,
    {
        let (result_sender, result_receiver) = oneshot::channel();
        // The command runs even if the caller no longer waits for its result.
        let command: Command = Box::new(move |cluster| drop(result_sender.send(command(cluster))));
        self.commands.send(command).map_err(|_| Error::Stopped)?;
        Ok(result_receiver.await.map_err(|_| Error::Stopped)??)
    }

    async fn end_offset(&self, topic: &str, partition: i32) -> Result<i64, Error> {
        let (config, topic) = (self.client(), topic.to_owned());
        let end_offset = tokio::task::spawn_blocking(move || {
            let consumer = config.create::<BaseConsumer>()?;
            consumer.fetch_watermarks(&topic, partition, REQUEST_TIMEOUT).map(|(_, end_offset)| end_offset)
        });
        Ok(end_offset.await.map_err(|_| Error::Stopped)??)
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.cluster)
            .set("message.timeout.ms", REQUEST_TIMEOUT.as_millis().to_string())
            // Idempotence keeps the order of records when one is sent again. Restored offsets depend on the order.
            .set("enable.idempotence", "true");
        config
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread ends after its last command. Joining it ensures that the server has stopped.
        self.commands = mpsc::channel().0;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Awaits the deliveries once there are at least `count` of them.
async fn await_deliveries(deliveries: &mut Vec<rdkafka::producer::DeliveryFuture>, count: usize) -> Result<(), Error> {
    if deliveries.len() >= count {
        for delivery in deliveries.drain(..) {
            delivery.await.map_err(|_| Error::Stopped)?.map_err(|(error, _)| error)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rdkafka::message::{Headers, Message, OwnedMessage};
    use rdkafka::{Offset, TopicPartitionList};

    use super::*;

    /// Consumes with a plain consumer of a group.
    fn consume(server: &Server, topic: &str, count: usize) -> Vec<OwnedMessage> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", server.bootstrap_servers())
            .set("group.id", "test")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&[topic]).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let mut found = Vec::new();
        while found.len() < count {
            assert!(std::time::Instant::now() < deadline, "{} of {count} records", found.len());
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                found.push(message.detach());
            }
        }
        found
    }

    fn saved(offset: i64) -> SavedRecord {
        SavedRecord {
            offset,
            timestamp_ms: 1_700_000_000_000 + offset,
            key: Some(b"key".to_vec()),
            value: format!("pointer {offset}").into_bytes(),
            headers: vec![("lfs-upload-id".into(), b"id".to_vec())],
        }
    }

    #[tokio::test]
    async fn records_are_restored_at_their_offsets() {
        let server = Server::start().unwrap();
        server.restore("videos", 2, vec![saved(3), saved(4), saved(7)]).await.unwrap();
        let found = consume(&server, "videos", 8);
        for (offset, message) in found.iter().enumerate() {
            assert_eq!((message.partition(), message.offset()), (2, offset as i64));
            let gap = !matches!(offset, 3 | 4 | 7);
            let header = if gap { GAP_HEADER } else { "lfs-upload-id" };
            assert_eq!(message.headers().unwrap().get(0).key, header);
            match message.payload() {
                None => assert!(gap && message.key().is_none()),
                Some(value) => {
                    assert_eq!(value, format!("pointer {offset}").as_bytes());
                    assert_eq!(message.key(), Some(b"key".as_slice()));
                    assert_eq!(message.timestamp().to_millis(), Some(1_700_000_000_000 + offset as i64));
                }
            }
        }
        let conflict = server.restore("videos", 2, vec![saved(7)]).await;
        assert!(matches!(conflict, Err(Error::OffsetConflict { next: 8, .. })), "{conflict:?}");
        let gap = server.restore("videos", 0, vec![saved(MAX_GAP_RECORDS + 1)]).await;
        assert!(matches!(gap, Err(Error::GapTooLarge { next: 0, .. })), "{gap:?}");
    }

    #[tokio::test]
    async fn records_survive_an_outage() {
        let server = Server::start().unwrap();
        server.restore("videos", 0, vec![saved(0)]).await.unwrap();
        server.down().await.unwrap();
        assert!(std::net::TcpStream::connect(server.bootstrap_servers()).is_err());
        server.up().await.unwrap();
        assert_eq!(consume(&server, "videos", 1).len(), 1);
        let address = server.bootstrap_servers();
        server.stop();
        assert!(std::net::TcpStream::connect(address).is_err());
    }

    /// Polls until the consumer returns a record.
    fn next(consumer: &BaseConsumer) -> OwnedMessage {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            assert!(std::time::Instant::now() < deadline, "no record within 30 s");
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                return message.detach();
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_consumer_survives_a_restart_on_the_same_port() {
        let server = Server::start_on_port(0).await.unwrap();
        let port = server.port().unwrap();
        server.restore("videos", 0, vec![saved(0)]).await.unwrap();
        let consumer: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", server.bootstrap_servers()).set("group.id", "test").create().unwrap();
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset("videos", 0, Offset::Beginning).unwrap();
        consumer.assign(&assignment).unwrap();
        assert_eq!(next(&consumer).offset(), 0);
        let metadata = consumer.fetch_metadata(Some("videos"), REQUEST_TIMEOUT).unwrap();
        let named: Vec<i32> = metadata.brokers().iter().map(|broker| broker.port()).collect();
        assert_eq!(named, [i32::from(port)], "the metadata names another port than the server's");

        let taken = Server::start_on_port(port).await.err().unwrap();
        assert!(matches!(taken, Error::Listen { port: found, .. } if found == port), "{taken}");
        server.stop();
        let server = Server::start_on_port(port).await.unwrap();
        server.restore("videos", 0, vec![saved(0), saved(1)]).await.unwrap();
        assert_eq!(next(&consumer).payload(), Some(b"pointer 1".as_slice()));
        assert_eq!(consume(&server, "videos", 2).len(), 2, "the group coordinator cannot be reached through the port");
        // Closing a consumer waits for its group coordinator, so the consumer must be closed before the server stops.
        drop(consumer);
    }
}
