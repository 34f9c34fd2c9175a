package lfsbroker.kafka;

import java.io.InputStream;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.function.UnaryOperator;

/** The bytes by {@code POST /lfs/resolve}: no credentials of S3, only a token that may read the pointer's topic. */
final class BrokerSource implements Source {
    private final Broker broker;
    /** The topic that the broker publishes its own pointers to, by the record's. */
    private final UnaryOperator<String> stagingTopic;
    /** The topic of the records; null where none is known. */
    private final String topic;

    BrokerSource(Broker broker, UnaryOperator<String> stagingTopic) {
        this(broker, stagingTopic, null);
    }

    private BrokerSource(Broker broker, UnaryOperator<String> stagingTopic, String topic) {
        this.broker = broker;
        this.stagingTopic = stagingTopic;
        this.topic = topic;
    }

    @Override
    public Source boundTo(String topic) {
        return new BrokerSource(broker, stagingTopic, topic);
    }

    @Override
    public InputStream open(Pointer pointer, String versionId) {
        List<String> query = new ArrayList<>();
        if (versionId != null) {
            query.add("version_id=" + URLEncoder.encode(versionId, StandardCharsets.UTF_8));
        }
        if (topic != null) {
            query.add("topic=" + URLEncoder.encode(owner(pointer), StandardCharsets.UTF_8));
        }
        String asked = query.isEmpty() ? "" : "?" + String.join("&", query);
        return broker.get(broker.call("POST", "/lfs/resolve" + asked, pointer.json(), null));
    }

    /** The topic that the object must belong to: the record's, or its staging topic, where the serializer's uploads are. */
    private String owner(Pointer pointer) {
        String staging = stagingTopic.apply(topic);
        return pointer.key().contains("/" + staging + "/lfs/") ? staging : topic;
    }

    @Override
    public void close() {}
}
