import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;

/**
 * Sends 40 MiB through Kafka and reads them back: {@code java -cp CLASSPATH LargeValues.java TOPIC}, with clients/java,
 * Kafka's clients and Jackson on the class path. {@code TOPIC.lfs-staging} must exist too: clients/java/README.md says why.
 */
public final class LargeValues {
    private static final String KAFKA = System.getenv("KAFKA_BOOTSTRAP_SERVERS");
    private static final String BROKER = System.getenv("LFS_BROKER_URL");

    public static void main(String[] arguments) throws Exception {
        String topic = arguments[0];
        byte[] sent = new byte[40 << 20];
        sent[sent.length - 1] = 1;

        try (var producer = new KafkaProducer<String, byte[]>(Map.of(
                "bootstrap.servers", KAFKA,
                "key.serializer", "org.apache.kafka.common.serialization.StringSerializer",
                // The two settings that clients/java needs.
                "value.serializer", "lfsbroker.kafka.LfsSerializer",
                "lfs.broker.url", BROKER))) {
            producer.send(new ProducerRecord<>(topic, 0, "order-17", sent)).get();
        }

        try (var consumer = new KafkaConsumer<String, byte[]>(Map.of(
                "bootstrap.servers", KAFKA,
                "isolation.level", "read_committed",
                "key.deserializer", "org.apache.kafka.common.serialization.StringDeserializer",
                // The two settings that clients/java needs.
                "value.deserializer", "lfsbroker.kafka.LfsDeserializer",
                "lfs.broker.url", BROKER))) {
            var partition = List.of(new TopicPartition(topic, 0));
            consumer.assign(partition);
            consumer.seekToBeginning(partition);
            for (int tries = 0; tries < 60; tries++) {
                for (var record : consumer.poll(Duration.ofSeconds(1))) {
                    boolean same = Arrays.equals(sent, record.value());
                    System.out.println(record.key() + ": " + record.value().length + " bytes, " + (same ? "equal to the sent bytes" : "different from the sent bytes"));
                    System.exit(same ? 0 : 1);
                }
            }
        }
        throw new IllegalStateException("the record did not arrive within a minute");
    }
}
