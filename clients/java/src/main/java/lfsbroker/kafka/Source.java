package lfsbroker.kafka;

import java.io.IOException;
import java.io.InputStream;

/** Where the bytes behind a pointer are had from: through the broker, or from S3 with credentials of one's own. */
interface Source extends AutoCloseable {
    /**
     * Opens the bytes, unverified.
     *
     * @param versionId the record's {@code lfs-version-id}, or null
     */
    InputStream open(Pointer pointer, String versionId) throws IOException;

    /** The same for pointers in records of this topic: one that was copied there from another topic is refused. */
    default Source boundTo(String topic) {
        return this;
    }

    @Override
    void close();
}
