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

/** The broker's HTTP API and the signed requests that it hands out, each tried again where that may help. */
final class Broker {
    static final ObjectMapper MAPPER = new ObjectMapper();

    private static final int ATTEMPTS = 6;
    private static final Duration CALL = Duration.ofSeconds(40);
    /** A part or a single PUT, of at most 64 MiB. */
    private static final Duration PUT = Duration.ofMinutes(5);

    private static final Pattern S3_CODE = Pattern.compile("<Code>(\\w+)</Code>");

    private final LfsConfig config;
    private final URI url;
    private final Duration patience;
    private final HttpClient http = HttpClient.newBuilder()
            .version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofSeconds(10))
            .followRedirects(HttpClient.Redirect.NEVER)
            .build();

    Broker(LfsConfig config) {
        this(config, CALL);
    }

    /** With {@code patience} for an answer: of the broker whole, of S3 until its headers. */
    Broker(LfsConfig config, Duration patience) {
        this.config = config;
        this.url = config.brokerUrl();
        this.patience = patience;
    }

    /** The policy of a topic, asked for once; an empty one where none is stored. */
    CompletableFuture<JsonNode> policy(String topic) {
        try {
            HttpRequest request = request("GET", "/lfs/topics/" + topic, null).timeout(patience).build();
            return http.sendAsync(request, BodyHandlers.ofByteArray())
                    .thenApply(answer -> answer.statusCode() == 404 ? MAPPER.createObjectNode() : json(answer));
        } catch (LfsException error) {
            return CompletableFuture.failedFuture(error);
        }
    }

    /** Asks, and gives the JSON of an answer that is no problem. */
    JsonNode call(String method, String path, byte[] body, String idempotencyKey) {
        HttpRequest.Builder request = request(method, path, body);
        if (idempotencyKey != null) {
            request.header("idempotency-key", idempotencyKey);
        }
        return json(send(request.build(), BodyHandlers.ofByteArray(), patience));
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

    private static JsonNode json(HttpResponse<byte[]> answer) {
        try {
            JsonNode json = MAPPER.readTree(answer.body());
            if (answer.statusCode() < 300) {
                return json;
            }
            throw new LfsException.Refused(json.path("code").asText("HTTP " + answer.statusCode()), json.path("detail").asText());
        } catch (IOException error) {
            throw new LfsException.Refused("HTTP " + answer.statusCode(), "the answer is no JSON: is lfs-broker there?");
        }
    }

    /**
     * Sends bytes to S3 by a signed request, and by a second one of {@code again} where the first ran out meanwhile: a
     * URL has its own end, and comes to it early where the credentials that signed it do.
     */
    void put(JsonNode signed, Supplier<JsonNode> again, byte[] value, int offset, int length) {
        HttpResponse<byte[]> answer = put(signed, value, offset, length);
        if (answer.statusCode() == 403 || s3Code(answer).equals("ExpiredToken")) {
            answer = put(again.get(), value, offset, length);
        }
        // Refused by if-none-match: the object is there, from an attempt whose answer was lost. Complete finds out whose it is.
        if (answer.statusCode() >= 300 && answer.statusCode() != 412) {
            throw refused(s3Code(answer));
        }
    }

    private HttpResponse<byte[]> put(JsonNode signed, byte[] value, int offset, int length) {
        BodyPublisher body = BodyPublishers.ofByteArray(value, offset, length);
        HttpRequest request = signed(signed).method(signed.path("method").asText(), body).build();
        return send(request, BodyHandlers.ofByteArray(), PUT);
    }

    private static String s3Code(HttpResponse<byte[]> answer) {
        Matcher code = S3_CODE.matcher(new String(answer.body(), StandardCharsets.UTF_8));
        return code.find() ? code.group(1) : "HTTP " + answer.statusCode();
    }

    /** Opens the bytes of a signed request. Reading them takes as long as it takes: the reader watches that they come. */
    InputStream get(JsonNode signed) {
        HttpResponse<InputStream> answer = send(signed(signed).GET().build(), BodyHandlers.ofInputStream(), patience);
        if (answer.statusCode() == 200) {
            return answer.body();
        }
        close(answer.body());
        throw refused("HTTP " + answer.statusCode());
    }

    private static LfsException refused(String code) {
        return new LfsException.Refused(code, "S3 did not accept the signed request");
    }

    private static HttpRequest.Builder signed(JsonNode signed) {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(signed.path("url").asText()));
        signed.path("headers").properties().forEach(header -> {
            // The client writes these two itself, from the body and the address; it takes them from nobody.
            if (!header.getKey().equalsIgnoreCase("content-length") && !header.getKey().equalsIgnoreCase("host")) {
                request.header(header.getKey(), header.getValue().asText());
            }
        });
        return request;
    }

    private <T> HttpResponse<T> send(HttpRequest request, BodyHandler<T> handler, Duration patience) {
        IOException last = null;
        for (int attempt = 1; attempt <= ATTEMPTS; attempt++) {
            try {
                HttpResponse<T> answer = sendOnce(request, handler, patience);
                if (!again(request, answer.statusCode())) {
                    return answer;
                }
                last = new IOException("HTTP " + answer.statusCode());
                if (answer.body() instanceof InputStream body) {
                    close(body);
                }
            } catch (IOException error) {
                last = error;
            }
            if (attempt < ATTEMPTS) {
                pause(attempt);
            }
        }
        String place = request.uri().getScheme() + "://" + request.uri().getAuthority();
        throw new LfsException.Unavailable(place + " does not answer: " + last, last);
    }

    /**
     * Waits until the handler has what it wants: a stream is had with the headers, bytes only with the last of them. The
     * request's own timeout would do neither on every Java: some end it with the headers, newer ones with the body.
     */
    private <T> HttpResponse<T> sendOnce(HttpRequest request, BodyHandler<T> handler, Duration patience) throws IOException {
        CompletableFuture<HttpResponse<T>> asked = http.sendAsync(request, handler);
        try {
            return asked.get(patience.toMillis(), TimeUnit.MILLISECONDS);
        } catch (TimeoutException error) {
            drop(asked);
            throw new IOException("no answer within " + patience, error);
        } catch (InterruptedException error) {
            drop(asked);
            throw new InterruptException(error);
        } catch (ExecutionException | CancellationException error) {
            throw error.getCause() instanceof IOException cause ? cause : new IOException(error);
        }
    }

    /** Ends the exchange; an answer that comes at the same moment is closed. */
    private static <T> void drop(CompletableFuture<HttpResponse<T>> asked) {
        asked.cancel(true);
        asked.whenComplete((answer, error) -> {
            if (answer != null && answer.body() instanceof InputStream body) {
                close(body);
            }
        });
    }

    private static boolean again(HttpRequest request, int status) {
        // S3 still decides between two conditional PUTs, or the broker still stores the first request under this key.
        boolean undecided = status == 409
                && (request.method().equals("PUT") || request.headers().firstValue("idempotency-key").isPresent());
        return undecided || status == 429 || status >= 500;
    }

    private static void pause(int attempt) {
        long most = Math.min(5_000, 100L << attempt);
        try {
            Thread.sleep(ThreadLocalRandom.current().nextLong(most / 2, most));
        } catch (InterruptedException error) {
            throw new InterruptException(error);
        }
    }

    private static void close(InputStream body) {
        try {
            body.close();
        } catch (IOException error) {
            // What it would have said is not wanted any more.
        }
    }
}
