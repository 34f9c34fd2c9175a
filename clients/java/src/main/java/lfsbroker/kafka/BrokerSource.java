package lfsbroker.kafka;

import java.io.InputStream;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.function.UnaryOperator;

/** Reads objects through {@code POST /lfs/resolve}. Needs no S3 credentials, only a token with read access to the topic. */
final class BrokerSource implements ObjectSource {
    private final BrokerClient broker;
    /** Maps a record's topic to its staging topic, to which the broker publishes its own pointers. */
    private final UnaryOperator<String> stagingTopic;
    /** The topic of the records, or null if it is not known. */
    private final String topic;

    BrokerSource(BrokerClient broker, UnaryOperator<String> stagingTopic) {
        this(broker, stagingTopic, null);
    }

    private BrokerSource(BrokerClient broker, UnaryOperator<String> stagingTopic, String topic) {
        this.broker = broker;
        this.stagingTopic = stagingTopic;
        this.topic = topic;
    }

    @Override
    public ObjectSource forTopic(String topic) {
        return new BrokerSource(broker, stagingTopic, topic);
    }

    @Override
    public InputStream open(Pointer pointer, String versionId) {
        List<String> parameters = new ArrayList<>();
        if (versionId != null) {
            parameters.add("version_id=" + URLEncoder.encode(versionId, StandardCharsets.UTF_8));
        }
        if (topic != null) {
            parameters.add("topic=" + URLEncoder.encode(expectedTopic(pointer), StandardCharsets.UTF_8));
        }
        String query = parameters.isEmpty() ? "" : "?" + String.join("&", parameters);
        return broker.get(broker.call("POST", "/lfs/resolve" + query, pointer.json(), null));
    }

    /** The topic that the object must belong to: the record's topic, or its staging topic for uploads of the serializer. */
    private String expectedTopic(Pointer pointer) {
        String staging = stagingTopic.apply(topic);
        return pointer.key().contains("/" + staging + "/lfs/") ? staging : topic;
    }

    @Override
    public void close() {}
}
