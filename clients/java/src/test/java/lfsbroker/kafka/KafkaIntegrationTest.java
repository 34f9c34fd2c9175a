package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.InputStream;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.UUID;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.config.ConfigException;
import org.apache.kafka.common.errors.RecordDeserializationException;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import software.amazon.awssdk.auth.credentials.AwsBasicCredentials;
import software.amazon.awssdk.auth.credentials.StaticCredentialsProvider;
import software.amazon.awssdk.core.sync.RequestBody;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.s3.S3Client;

/**
 * Tests with stock producers and consumers, a real Kafka and a running broker. {@code .ci/checks/java-client.sh} starts both
 * and sets their addresses in the environment. Without these variables every test here fails.
 */
class KafkaIntegrationTest {
    private static final int LARGE_BYTES = 41_943_041;

    private final String topic = "java-" + UUID.randomUUID();
    private final String stagingTopic = topic + ".lfs-staging";

    private static String env(String name) {
        String value = System.getenv(name);
        assertNotNull(value, name + " is not set: run .ci/checks/java-client.sh");
        return value;
    }

    private static String kafka() {
        return env("KAFKA_BOOTSTRAP_SERVERS");
    }

    @BeforeEach
    void createTopics() throws Exception {
        try (Admin admin = Admin.create(Map.of("bootstrap.servers", kafka()))) {
            short replicas = 1;
            admin.createTopics(List.of(new NewTopic(topic, 1, replicas), new NewTopic(stagingTopic, 1, replicas))).all().get();
        }
    }

    @AfterEach
    void deleteTopics() throws Exception {
        try (Admin admin = Admin.create(Map.of("bootstrap.servers", kafka()))) {
            admin.deleteTopics(List.of(topic, stagingTopic)).all().get();
        }
    }

    /** An application's settings, and the two lines that it adds for this module. */
    private <T> KafkaProducer<String, T> producer(Map<String, Object> overrides) {
        Map<String, Object> settings = new HashMap<>(Map.of(
                "bootstrap.servers", kafka(),
                "key.serializer", StringSerializer.class.getName(),
                "value.serializer", LfsSerializer.class.getName(),
                "lfs.broker.url", env("LFS_BROKER_URL")));
        settings.putAll(overrides);
        return new KafkaProducer<>(settings);
    }

    private <T> KafkaConsumer<String, T> consumer(String topic, Class<?> deserializer, Map<String, Object> overrides) {
        Map<String, Object> settings = new HashMap<>(Map.of(
                "bootstrap.servers", kafka(),
                "isolation.level", "read_committed",
                "key.deserializer", StringDeserializer.class.getName(),
                "value.deserializer", deserializer.getName(),
                "lfs.broker.url", env("LFS_BROKER_URL")));
        settings.putAll(overrides);
        KafkaConsumer<String, T> consumer = new KafkaConsumer<>(settings);
        TopicPartition partition = new TopicPartition(topic, 0);
        consumer.assign(List.of(partition));
        consumer.seekToBeginning(List.of(partition));
        return consumer;
    }

    /** The settings with which a consumer reads the broker's bucket directly from S3. */
    private static Map<String, Object> ownCredentials(String buckets) {
        return Map.of(
                "lfs.s3.buckets", buckets,
                "lfs.s3.endpoint", env("AWS_ENDPOINT_URL_S3"),
                "lfs.s3.region", env("AWS_REGION"),
                "lfs.s3.access.key.id", env("AWS_ACCESS_KEY_ID"),
                "lfs.s3.secret.access.key", env("AWS_SECRET_ACCESS_KEY"));
    }

    private static <T> List<ConsumerRecord<String, T>> read(KafkaConsumer<String, T> consumer, int count) {
        List<ConsumerRecord<String, T>> records = new ArrayList<>();
        long deadline = System.nanoTime() + Duration.ofSeconds(60).toNanos();
        while (records.size() < count && System.nanoTime() < deadline) {
            consumer.poll(Duration.ofMillis(500)).forEach(records::add);
        }
        assertEquals(count, records.size());
        return records;
    }

    private <T> List<T> values(Class<?> deserializer, Map<String, Object> overrides, int count) {
        try (KafkaConsumer<String, T> consumer = consumer(topic, deserializer, overrides)) {
            return read(consumer, count).stream().map(ConsumerRecord::value).toList();
        }
    }

    private <T> void send(Map<String, Object> overrides, List<T> values) throws Exception {
        try (KafkaProducer<String, T> producer = producer(overrides)) {
            for (T value : values) {
                producer.send(new ProducerRecord<>(topic, "k", value)).get();
            }
        }
    }

    private static byte[] random(int size) {
        byte[] bytes = new byte[size];
        new Random(size).nextBytes(bytes);
        return bytes;
    }

    private static byte[] text(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    /** The first record's value as Kafka stores it. */
    private byte[] raw() {
        return this.<byte[]>values(ByteArrayDeserializer.class, Map.of(), 1).get(0);
    }

    @Test
    void aLargeValueIsReadBackUnchanged() throws Exception {
        byte[] large = random(LARGE_BYTES);
        send(Map.of(), List.of(large));
        byte[] raw = raw();
        assertTrue(Pointer.looksLike(raw) && raw.length < 1_000, raw.length + " bytes in Kafka");
        assertArrayEquals(large, this.<byte[]>values(LfsDeserializer.class, Map.of(), 1).get(0));
        assertArrayEquals(large, this.<byte[]>values(LfsDeserializer.class, ownCredentials(Pointer.parse(raw).bucket()), 1).get(0));
        try (InputStream stream = this.<InputStream>values(LfsStreamDeserializer.class, Map.of(), 1).get(0)) {
            assertArrayEquals(large, stream.readAllBytes());
        }
        // The application's topic has only the application's record; the broker's own pointer is in the staging topic.
        try (KafkaConsumer<String, byte[]> own = consumer(stagingTopic, ByteArrayDeserializer.class, Map.of())) {
            assertArrayEquals(raw, read(own, 1).get(0).value());
        }
    }

    @Test
    void aMultipartValueIsReadBackUnchanged() throws Exception {
        byte[] large = random((64 << 20) + 1);
        send(Map.of(), List.of(large));
        assertArrayEquals(large, this.<byte[]>values(LfsDeserializer.class, Map.of(), 1).get(0));
    }

    @Test
    void smallValuesAndTombstonesAreSentInline() throws Exception {
        List<byte[]> sent = new ArrayList<>(List.of(text("small"), text("{\"json\":1}"), new byte[0], random(9_999)));
        sent.add(null);
        send(Map.of("lfs.min.bytes", 10_000), sent);
        List<byte[]> raw = values(ByteArrayDeserializer.class, Map.of(), 5);
        List<byte[]> back = values(LfsDeserializer.class, Map.of(), 5);
        for (int index = 0; index < sent.size(); index++) {
            assertArrayEquals(sent.get(index), raw.get(index));
            assertArrayEquals(sent.get(index), back.get(index));
        }
        assertNull(back.get(4));
        List<InputStream> streams = values(LfsStreamDeserializer.class, Map.of(), 5);
        assertArrayEquals(sent.get(3), streams.get(3).readAllBytes());
        assertNull(streams.get(4));
    }

    @Test
    void aValueOfExactlyMinBytesIsUploaded() throws Exception {
        send(Map.of("lfs.min.bytes", 10_000), List.of(random(10_000)));
        assertTrue(Pointer.looksLike(raw()));
        Map<String, Object> plain = Map.of();
        assertEquals((1 << 20) - (64 << 10), new LfsConfig(plain).inlineLimitBytes());
        assertEquals((100 << 20) - (64 << 10), new LfsConfig(Map.of("max.request.size", " 104857600 ")).inlineLimitBytes());
    }

    @Test
    void thePolicysMinBytesAppliesIfTheApplicationSetsNone() throws Exception {
        BrokerClient broker = new BrokerClient(new LfsConfig(Map.of("lfs.broker.url", env("LFS_BROKER_URL"))));
        broker.call("PUT", "/lfs/topics/" + stagingTopic, text("{\"min_bytes\":1000}"), null);
        send(Map.of(), List.of(random(999), random(1_000)));
        List<byte[]> raw = values(ByteArrayDeserializer.class, Map.of(), 2);
        assertArrayEquals(random(999), raw.get(0));
        assertTrue(Pointer.looksLike(raw.get(1)));
        // A min_bytes above what the producer can send inline is lowered to that limit.
        broker.call("PUT", "/lfs/topics/" + stagingTopic, text("{\"min_bytes\":100000000}"), null);
        send(Map.of(), List.of(random(1 << 20)));
        assertTrue(Pointer.looksLike(this.<byte[]>values(ByteArrayDeserializer.class, Map.of(), 3).get(2)));
    }

    @Test
    void smallValuesAreSentWhileTheBrokerIsDown() throws Exception {
        send(Map.of("lfs.broker.url", "http://127.0.0.1:9"), List.of(text("small")));
        assertArrayEquals(text("small"), raw());
        send(Map.of("lfs.broker.token.file", "/nowhere"), List.of(text("small")));
    }

    @Test
    void theApplicationsOwnSerializersAreUsed() throws Exception {
        String large = "ä".repeat(700_000);
        send(Map.of("lfs.value.serializer", StringSerializer.class.getName()), List.of("small", large));
        List<String> back = values(LfsDeserializer.class, Map.of("lfs.value.deserializer", StringDeserializer.class.getName()), 2);
        assertEquals(List.of("small", large), back);
    }

    @Test
    void pointersThatTheBrokerPublishesAreResolved() throws Exception {
        byte[] value = text("put with the HTTP API");
        BrokerClient broker = new BrokerClient(new LfsConfig(Map.of("lfs.broker.url", env("LFS_BROKER_URL"))));
        String request = "{\"topic\":\"" + topic + "\",\"key\":\"k\",\"size\":" + value.length + ",\"sha256\":\""
                + Checksum.sha256(value, 0, value.length) + "\"}";
        JsonNode upload = broker.call("POST", "/lfs/uploads", text(request), null);
        broker.put(upload.path("upload"), () -> upload.path("upload"), value, 0, value.length);
        broker.call("POST", "/lfs/uploads/" + upload.path("id").asText() + "/complete", null, null);
        assertArrayEquals(value, this.<byte[]>values(LfsDeserializer.class, Map.of(), 1).get(0));
    }

    /** S3 rejects a wrong signature with the same status as an expired one. */
    @Test
    void aRepeatedOpenRequestReturnsANewUrlAfterS3RejectedTheFirst() throws Exception {
        byte[] value = text("hello");
        BrokerClient broker = new BrokerClient(new LfsConfig(Map.of("lfs.broker.url", env("LFS_BROKER_URL"))));
        byte[] openRequest = text("{\"topic\":\"" + topic + "\",\"size\":5}");
        String key = UUID.randomUUID().toString();
        JsonNode upload = broker.call("POST", "/lfs/uploads", openRequest, key);
        ObjectNode rejected = upload.path("upload").deepCopy();
        rejected.put("url", rejected.path("url").asText().replaceFirst("X-Amz-Signature=\\w+", "X-Amz-Signature=" + "0".repeat(64)));
        broker.put(rejected, () -> broker.call("POST", "/lfs/uploads", openRequest, key).path("upload"), value, 0, value.length);
        String path = "/lfs/uploads/" + upload.path("id").asText();
        broker.call("POST", path + "/complete", text("{\"sha256\":\"" + Checksum.sha256(value, 0, value.length) + "\"}"), null);
        assertArrayEquals(value, this.<byte[]>values(LfsDeserializer.class, Map.of(), 1).get(0));
    }

    private Throwable failure(Class<?> deserializer, Map<String, Object> overrides) {
        try (KafkaConsumer<String, Object> consumer = consumer(topic, deserializer, overrides)) {
            RecordDeserializationException error =
                    assertThrows(RecordDeserializationException.class, () -> read(consumer, 1));
            assertEquals(0, error.offset());
            return error.getCause();
        }
    }

    @Test
    void corruptBytesAreAnIntegrityError() throws Exception {
        send(Map.of("lfs.min.bytes", 1), List.of(text("hello")));
        Pointer pointer = Pointer.parse(raw());
        try (S3Client s3 = S3Client.builder()
                .endpointOverride(URI.create(env("AWS_ENDPOINT_URL_S3")))
                .region(Region.of(env("AWS_REGION")))
                .forcePathStyle(true)
                .credentialsProvider(StaticCredentialsProvider.create(
                        AwsBasicCredentials.create(env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY"))))
                .build()) {
            s3.putObject(request -> request.bucket(pointer.bucket()).key(pointer.key()), RequestBody.fromString("hellO"));
        }
        assertInstanceOf(LfsException.Integrity.class, failure(LfsDeserializer.class, Map.of()));
        assertInstanceOf(LfsException.Integrity.class, failure(LfsDeserializer.class, ownCredentials(pointer.bucket())));
        try (InputStream stream = this.<InputStream>values(LfsStreamDeserializer.class, Map.of(), 1).get(0)) {
            assertThrows(LfsException.Integrity.class, stream::readAllBytes);
        }
    }

    @Test
    void aValueAboveMaxBytesIsNotRead() throws Exception {
        send(Map.of("lfs.min.bytes", 1), List.of(text("hello")));
        assertInstanceOf(LfsException.TooLarge.class, failure(LfsDeserializer.class, Map.of("lfs.max.bytes", 4)));
        assertArrayEquals(text("hello"), this.<byte[]>values(LfsDeserializer.class, Map.of("lfs.max.bytes", 5), 1).get(0));
    }

    @Test
    void aForgedPointerIsForbidden() throws Exception {
        String forged = "{\"kfs_lfs\":1,\"bucket\":\"secrets\",\"key\":\"k\",\"size\":1}";
        send(Map.of("value.serializer", ByteArraySerializer.class.getName()), List.of(text(forged)));
        for (Map<String, Object> mode : List.of(Map.<String, Object>of(), ownCredentials("lfs-dev"))) {
            LfsException.Refused refused = assertInstanceOf(LfsException.Refused.class, failure(LfsDeserializer.class, mode));
            assertEquals("pointer-forbidden", refused.code());
        }
    }

    @Test
    void dataThatLooksLikeAPointerIsReadBackUnchanged() throws Exception {
        byte[] data = text("{\"kfs_lfs\":1,\"bucket\":\"secrets\",\"key\":\"k\",\"size\":1}");
        send(Map.of(), List.of(data));
        assertArrayEquals(data, this.<byte[]>values(LfsDeserializer.class, Map.of(), 1).get(0));
        try (InputStream stream = this.<InputStream>values(LfsStreamDeserializer.class, Map.of(), 1).get(0)) {
            assertArrayEquals(data, stream.readAllBytes());
        }
    }

    @Test
    void aPointerWhoseObjectIsMissingIsAnError() throws Exception {
        send(Map.of("lfs.min.bytes", 1), List.of(text("hello")));
        Pointer pointer = Pointer.parse(raw());
        String gone = new String(pointer.json(), StandardCharsets.UTF_8).replace(pointer.key(), pointer.key() + "0");
        BrokerClient broker = new BrokerClient(new LfsConfig(Map.of("lfs.broker.url", env("LFS_BROKER_URL"))));
        LfsException.Refused refused =
                assertThrows(LfsException.Refused.class, () -> broker.call("POST", "/lfs/resolve", text(gone), null));
        assertTrue(List.of("object-gone", "pointer-forbidden").contains(refused.code()), refused.code());
        try (S3Source s3 = new S3Source(new LfsConfig(ownCredentials(pointer.bucket())))) {
            refused = assertThrows(LfsException.Refused.class, () -> s3.open(Pointer.parse(text(gone)), null));
            assertEquals("NoSuchKey", refused.code());
        }
    }

    @Test
    void sendingALargeValueFailsIfTheBrokerIsUnreachable() {
        Map<String, Object> nowhere = Map.of("lfs.broker.url", "http://127.0.0.1:9", "lfs.min.bytes", 1);
        try (KafkaProducer<String, byte[]> producer = producer(nowhere)) {
            assertThrows(
                    LfsException.Unavailable.class, () -> producer.send(new ProducerRecord<>(topic, "k", text("hello"))));
        }
    }

    @Test
    void aConsumerThatReadsUncommittedRecordsIsWarned() {
        assertNull(LfsStreamDeserializer.isolationWarning(Map.of("isolation.level", "read_committed")));
        assertTrue(LfsStreamDeserializer.isolationWarning(Map.of()).contains("isolation.level"));
        assertTrue(LfsStreamDeserializer.isolationWarning(Map.of("isolation.level", "read_uncommitted")).contains("read_committed"));
    }

    @Test
    void aConsumerWhosePollMayExceedTheHeapIsWarned() {
        assertNull(LfsDeserializer.heapWarning(Map.of("max.poll.records", "4"), 256, 1_024));
        assertTrue(LfsDeserializer.heapWarning(Map.of("max.poll.records", 5), 256, 1_024).contains("max.poll.records"));
        assertTrue(LfsDeserializer.heapWarning(Map.of(), 256 << 20, 4L << 30).contains("500 records"));
        assertTrue(LfsDeserializer.heapWarning(Map.of("max.poll.records", Integer.MAX_VALUE), Integer.MAX_VALUE, 1L << 40).contains("heap"));
    }

    @Test
    void useAsAKeySerializerOrWithoutAUrlIsRejected() throws IOException {
        Map<String, Object> settings = Map.of("lfs.broker.url", "http://127.0.0.1:9");
        try (LfsSerializer<byte[]> serializer = new LfsSerializer<>(); LfsDeserializer<byte[]> deserializer = new LfsDeserializer<>()) {
            assertThrows(ConfigException.class, () -> serializer.configure(settings, true));
            assertThrows(ConfigException.class, () -> deserializer.configure(settings, true));
            assertThrows(ConfigException.class, () -> serializer.configure(Map.of(), false));
        }
        assertEquals(ByteArraySerializer.class, new LfsConfig(settings).getClass(LfsConfig.VALUE_SERIALIZER));
    }
}
