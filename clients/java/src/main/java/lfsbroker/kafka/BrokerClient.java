package lfsbroker.kafka;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.io.InputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandler;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Supplier;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.apache.kafka.common.errors.InterruptException;

/** Calls the broker's HTTP API and sends the presigned requests that the broker returns. Retries where a retry may help. */
final class BrokerClient {
    static final ObjectMapper MAPPER = new ObjectMapper();

    private static final int MAX_ATTEMPTS = 6;
    private static final Duration RESPONSE_TIMEOUT = Duration.ofSeconds(40);
    /** For one part or one single PUT, of at most 64 MiB. */
    private static final Duration PUT_TIMEOUT = Duration.ofMinutes(5);

    private static final Pattern S3_ERROR_CODE = Pattern.compile("<Code>(\\w+)</Code>");

    private final LfsConfig config;
    private final URI url;
    private final Duration responseTimeout;
    private final HttpClient http = HttpClient.newBuilder()
            .version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofSeconds(10))
            .followRedirects(HttpClient.Redirect.NEVER)
            .build();

    BrokerClient(LfsConfig config) {
        this(config, RESPONSE_TIMEOUT);
    }

    /** The timeout covers the whole response of the broker, and the response headers of a GET from S3. */
    BrokerClient(LfsConfig config, Duration responseTimeout) {
        this.config = config;
        this.url = config.brokerUrl();
        this.responseTimeout = responseTimeout;
    }

    /** The topic's policy, or an empty object if the topic has none. Sends one request without retries. */
    CompletableFuture<JsonNode> policy(String topic) {
        try {
            HttpRequest request = request("GET", "/lfs/topics/" + topic, null).timeout(responseTimeout).build();
            return http.sendAsync(request, BodyHandlers.ofByteArray())
                    .thenApply(response -> response.statusCode() == 404 ? MAPPER.createObjectNode() : json(response));
        } catch (LfsException error) {
            return CompletableFuture.failedFuture(error);
        }
    }

    /** Calls the broker and returns the JSON of a successful response. */
    JsonNode call(String method, String path, byte[] body, String idempotencyKey) {
        HttpRequest.Builder request = request(method, path, body);
        if (idempotencyKey != null) {
            request.header("idempotency-key", idempotencyKey);
        }
        return json(send(request.build(), BodyHandlers.ofByteArray(), responseTimeout));
    }

    private HttpRequest.Builder request(String method, String path, byte[] body) {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(url + path))
                .method(method, body == null ? BodyPublishers.noBody() : BodyPublishers.ofByteArray(body))
                .header("accept", "application/json");
        if (body != null) {
            request.header("content-type", "application/json");
        }
        String token = config.token();
        if (token != null) {
            request.header("authorization", "Bearer " + token);
        }
        return request;
    }

    private static JsonNode json(HttpResponse<byte[]> response) {
        try {
            JsonNode json = MAPPER.readTree(response.body());
            if (response.statusCode() < 300) {
                return json;
            }
            throw new LfsException.Refused(json.path("code").asText("HTTP " + response.statusCode()), json.path("detail").asText());
        } catch (IOException error) {
            throw new LfsException.Refused("HTTP " + response.statusCode(), "the response is not JSON; check that "
                    + LfsConfig.BROKER_URL + " is the address of lfs-broker and not of another server");
        }
    }

    /**
     * Sends bytes to S3 by a presigned request. If the URL has expired, {@code presignAgain} supplies a new request for one
     * more try. A URL expires before its stated end if the credentials that signed it expire first.
     */
    void put(JsonNode presigned, Supplier<JsonNode> presignAgain, byte[] value, int offset, int length) {
        HttpResponse<byte[]> response = put(presigned, value, offset, length);
        if (response.statusCode() == 403 || s3ErrorCode(response).equals("ExpiredToken")) {
            response = put(presignAgain.get(), value, offset, length);
        }
        // 412: if-none-match failed because an earlier attempt, whose response was lost, stored the object.
        // Complete checks which upload the object belongs to.
        if (response.statusCode() >= 300 && response.statusCode() != 412) {
            throw refusedByS3(s3ErrorCode(response));
        }
    }

    private HttpResponse<byte[]> put(JsonNode presigned, byte[] value, int offset, int length) {
        BodyPublisher body = BodyPublishers.ofByteArray(value, offset, length);
        HttpRequest request = presignedRequest(presigned).method(presigned.path("method").asText(), body).build();
        return send(request, BodyHandlers.ofByteArray(), PUT_TIMEOUT);
    }

    private static String s3ErrorCode(HttpResponse<byte[]> response) {
        Matcher code = S3_ERROR_CODE.matcher(new String(response.body(), StandardCharsets.UTF_8));
        return code.find() ? code.group(1) : "HTTP " + response.statusCode();
    }

    /** Opens the body of a presigned GET. No timeout covers the body: the reader must detect a stalled download. */
    InputStream get(JsonNode presigned) {
        HttpRequest request = presignedRequest(presigned).GET().build();
        HttpResponse<InputStream> response = send(request, BodyHandlers.ofInputStream(), responseTimeout);
        if (response.statusCode() == 200) {
            return response.body();
        }
        close(response.body());
        throw refusedByS3("HTTP " + response.statusCode());
    }

    private static LfsException refusedByS3(String code) {
        return new LfsException.Refused(code, "S3 rejected the presigned request");
    }

    private static HttpRequest.Builder presignedRequest(JsonNode presigned) {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(presigned.path("url").asText()));
        presigned.path("headers").properties().forEach(header -> {
            // The JDK's client sets these two headers from the body and the URL, and rejects them from the caller.
            if (!header.getKey().equalsIgnoreCase("content-length") && !header.getKey().equalsIgnoreCase("host")) {
                request.header(header.getKey(), header.getValue().asText());
            }
        });
        return request;
    }

    private <T> HttpResponse<T> send(HttpRequest request, BodyHandler<T> handler, Duration timeout) {
        IOException lastError = null;
        for (int attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
            try {
                HttpResponse<T> response = sendOnce(request, handler, timeout);
                if (!isRetryable(request, response.statusCode())) {
                    return response;
                }
                lastError = new IOException("HTTP " + response.statusCode());
                if (response.body() instanceof InputStream body) {
                    close(body);
                }
            } catch (IOException error) {
                lastError = error;
            }
            if (attempt < MAX_ATTEMPTS) {
                sleepBeforeRetry(attempt);
            }
        }
        // Without path and query, because a presigned URL is a credential.
        String server = request.uri().getScheme() + "://" + request.uri().getAuthority();
        throw new LfsException.Unavailable(server + " cannot be reached (" + MAX_ATTEMPTS + " attempts): " + lastError, lastError);
    }

    /**
     * Waits for the response: for a stream until its headers arrive, for a byte array until the whole body arrives.
     * {@link HttpRequest.Builder#timeout} does not do this on every Java: its timeout covers the headers in some versions,
     * and the body too in newer versions.
     */
    private <T> HttpResponse<T> sendOnce(HttpRequest request, BodyHandler<T> handler, Duration timeout) throws IOException {
        CompletableFuture<HttpResponse<T>> exchange = http.sendAsync(request, handler);
        try {
            return exchange.get(timeout.toMillis(), TimeUnit.MILLISECONDS);
        } catch (TimeoutException error) {
            cancel(exchange);
            throw new IOException("no response within " + timeout.toMillis() + " ms", error);
        } catch (InterruptedException error) {
            cancel(exchange);
            throw new InterruptException(error);
        } catch (ExecutionException | CancellationException error) {
            throw error.getCause() instanceof IOException cause ? cause : new IOException(error);
        }
    }

    /** Cancels the exchange, and closes a response that arrives at the same moment. */
    private static <T> void cancel(CompletableFuture<HttpResponse<T>> exchange) {
        exchange.cancel(true);
        exchange.whenComplete((response, error) -> {
            if (response != null && response.body() instanceof InputStream body) {
                close(body);
            }
        });
    }

    private static boolean isRetryable(HttpRequest request, int status) {
        // 409: S3 has not yet decided between two conditional PUTs, or the broker still processes the first request with
        // this idempotency key.
        boolean undecided = status == 409
                && (request.method().equals("PUT") || request.headers().firstValue("idempotency-key").isPresent());
        return undecided || status == 429 || status >= 500;
    }

    private static void sleepBeforeRetry(int attempt) {
        long maxMillis = Math.min(5_000, 100L << attempt);
        try {
            Thread.sleep(ThreadLocalRandom.current().nextLong(maxMillis / 2, maxMillis));
        } catch (InterruptedException error) {
            throw new InterruptException(error);
        }
    }

    private static void close(InputStream body) {
        try {
            body.close();
        } catch (IOException error) {
            // The response is discarded, so an error of its close does not matter.
        }
    }
}
