package lfsbroker.kafka;

import java.io.FilterInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.URI;
import java.util.List;
import org.apache.kafka.common.config.ConfigException;
import org.apache.kafka.common.config.types.Password;
import software.amazon.awssdk.auth.credentials.AwsBasicCredentials;
import software.amazon.awssdk.auth.credentials.StaticCredentialsProvider;
import software.amazon.awssdk.awscore.exception.AwsServiceException;
import software.amazon.awssdk.core.ResponseInputStream;
import software.amazon.awssdk.core.exception.SdkException;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.s3.S3Client;
import software.amazon.awssdk.services.s3.S3ClientBuilder;
import software.amazon.awssdk.services.s3.model.GetObjectResponse;

/**
 * Reads objects from S3 with the consumer's own credentials. Any producer with write access to the topic can name any bucket
 * in a pointer, so only the configured buckets are read.
 */
final class S3Source implements ObjectSource {
    private final List<String> buckets;
    private final S3Client s3;

    S3Source(LfsConfig config) {
        buckets = config.getList(LfsConfig.S3_BUCKETS);
        String endpoint = config.getString(LfsConfig.S3_ENDPOINT);
        String region = config.getString(LfsConfig.S3_REGION);
        String keyId = config.getString(LfsConfig.S3_ACCESS_KEY_ID);
        Boolean pathStyle = config.getBoolean(LfsConfig.S3_PATH_STYLE);
        S3ClientBuilder builder = S3Client.builder().forcePathStyle(pathStyle == null ? endpoint != null : pathStyle);
        if (endpoint != null) {
            builder.endpointOverride(URI.create(endpoint));
        }
        if (region != null) {
            builder.region(Region.of(region));
        }
        Password secret = config.getPassword(LfsConfig.S3_SECRET_ACCESS_KEY);
        if ((keyId == null) != (secret == null)) {
            throw new ConfigException(LfsConfig.S3_ACCESS_KEY_ID + " and " + LfsConfig.S3_SECRET_ACCESS_KEY + " must be set together");
        }
        if (keyId != null) {
            builder.credentialsProvider(StaticCredentialsProvider.create(AwsBasicCredentials.create(keyId, secret.value())));
        }
        s3 = builder.build();
    }

    @Override
    public InputStream open(Pointer pointer, String versionId) {
        if (!buckets.contains(pointer.bucket())) {
            throw new LfsException.Refused("pointer-forbidden",
                    "the pointer names the bucket " + pointer.bucket() + ", which is not in " + LfsConfig.S3_BUCKETS);
        }
        try {
            ResponseInputStream<GetObjectResponse> body = s3.getObject(
                    request -> request.bucket(pointer.bucket()).key(pointer.key()).versionId(versionId));
            return new Body(body);
        } catch (AwsServiceException error) {
            if (error.statusCode() == 429 || error.statusCode() >= 500) {
                throw new LfsException.Unavailable("S3 cannot be reached: " + error.getMessage(), error);
            }
            String code = error.awsErrorDetails() == null ? "HTTP " + error.statusCode() : error.awsErrorDetails().errorCode();
            throw new LfsException.Refused(code, "S3 rejected the GET of " + pointer);
        } catch (SdkException error) {
            throw new LfsException.Unavailable("S3 cannot be reached: " + error.getMessage(), error);
        }
    }

    /** The response body. Turns the SDK's unchecked exceptions into {@code IOException}, so that callers retry them. */
    static final class Body extends FilterInputStream {
        private final ResponseInputStream<?> body;

        Body(ResponseInputStream<?> body) {
            super(body);
            this.body = body;
        }

        @Override
        public int read() throws IOException {
            try {
                return body.read();
            } catch (SdkException error) {
                throw new IOException(error.getMessage(), error);
            }
        }

        @Override
        public int read(byte[] buffer, int offset, int length) throws IOException {
            try {
                return body.read(buffer, offset, length);
            } catch (SdkException error) {
                throw new IOException(error.getMessage(), error);
            }
        }

        /** Aborts the connection, because the SDK's close would read the rest of the body. */
        @Override
        public void close() {
            body.abort();
        }
    }

    @Override
    public void close() {
        s3.close();
    }
}
