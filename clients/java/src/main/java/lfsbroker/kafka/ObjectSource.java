package lfsbroker.kafka;

import java.io.IOException;
import java.io.InputStream;

/** Where the bytes of a pointer's object come from: the broker, or S3 with the consumer's own credentials. */
interface ObjectSource extends AutoCloseable {
    /**
     * Opens the object's bytes without verifying them.
     *
     * @param versionId the record's {@code lfs-version-id}, or null
     */
    InputStream open(Pointer pointer, String versionId) throws IOException;

    /** A source for the records of this topic. It may reject a pointer that was copied there from another topic. */
    default ObjectSource forTopic(String topic) {
        return this;
    }

    @Override
    void close();
}
