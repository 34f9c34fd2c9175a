package lfsbroker.kafka;

import java.io.InputStream;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;

/** The bytes by {@code POST /lfs/resolve}: no credentials of S3, only a token that may read the pointer's topic. */
final class BrokerSource implements Source {
    private final Broker broker;

    BrokerSource(Broker broker) {
        this.broker = broker;
    }

    @Override
    public InputStream open(Pointer pointer, String versionId) {
        String version = versionId == null ? "" : "?version_id=" + URLEncoder.encode(versionId, StandardCharsets.UTF_8);
        return broker.get(broker.call("POST", "/lfs/resolve" + version, pointer.json(), null));
    }

    @Override
    public void close() {}
}
