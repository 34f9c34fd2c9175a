package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.io.IOException;
import java.io.InputStream;
import java.util.Map;
import org.apache.kafka.common.config.ConfigException;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;
import software.amazon.awssdk.core.ResponseInputStream;
import software.amazon.awssdk.core.exception.SdkClientException;
import software.amazon.awssdk.http.AbortableInputStream;
import software.amazon.awssdk.services.s3.model.GetObjectResponse;

class S3SourceTest {
    /** The SDK's own streams throw this exception for a wrong checksum and for an aborted call. */
    private static final class FailingStream extends InputStream {
        @Override
        public int read() {
            throw SdkClientException.create("the SDK's own error");
        }
    }

    @Test
    void anSdkExceptionWhileReadingBecomesAnIoException() throws IOException {
        var response = new ResponseInputStream<>(GetObjectResponse.builder().build(), AbortableInputStream.create(new FailingStream()));
        try (InputStream body = new S3Source.Body(response)) {
            assertEquals("the SDK's own error", assertThrows(IOException.class, body::read).getMessage());
            assertEquals("the SDK's own error", assertThrows(IOException.class, () -> body.read(new byte[8], 0, 8)).getMessage());
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"lfs.s3.access.key.id", "lfs.s3.secret.access.key"})
    void anAccessKeyIdAndItsSecretMustBeSetTogether(String setting) {
        var config = new LfsConfig(Map.of("lfs.s3.buckets", "b", "lfs.s3.region", "us-east-1", setting, "x"));
        assertThrows(ConfigException.class, () -> new S3Source(config).close());
    }
}
