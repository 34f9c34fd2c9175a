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
import java.time.Duration;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ThreadLocalRandom;
import org.apache.kafka.common.errors.InterruptException;

/** The broker's HTTP API and the signed requests that it hands out, each tried again where that may help. */
final class Broker {
    static final ObjectMapper MAPPER = new ObjectMapper();

    private static final int ATTEMPTS = 6;
    private static final Duration CALL = Duration.ofSeconds(40);
    /** A part or a single PUT; its URL lives longer. */
    private static final Duration PUT = Duration.ofMinutes(5);

    private final LfsConfig config;
    private final URI url;
    private final HttpClient http = HttpClient.newBuilder()
            .version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofSeconds(10))
            .followRedirects(HttpClient.Redirect.NEVER)
            .build();

    Broker(LfsConfig config) {
        this.config = config;
        this.url = config.brokerUrl();
    }

    /** The policy of a topic, asked for once; an empty one where none is stored. */
    CompletableFuture<JsonNode> policy(String topic) {
        try {
            return http.sendAsync(request("GET", "/lfs/topics/" + topic, null).build(), BodyHandlers.ofByteArray())
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
        return json(send(request.build(), BodyHandlers.ofByteArray()));
    }

    private HttpRequest.Builder request(String method, String path, byte[] body) {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(url + path))
                .timeout(CALL)
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

    /** Sends bytes to S3 by a signed request. */
    void put(JsonNode signed, byte[] value, int offset, int length) {
        BodyPublisher body = BodyPublishers.ofByteArray(value, offset, length);
        HttpRequest.Builder request = signed(signed).timeout(PUT).method(signed.path("method").asText(), body);
        HttpResponse<byte[]> answer = send(request.build(), BodyHandlers.ofByteArray());
        // Refused by if-none-match: the object is there, from an attempt whose answer was lost. Complete finds out whose it is.
        if (answer.statusCode() >= 300 && answer.statusCode() != 412) {
            throw refused(answer.statusCode());
        }
    }

    /** Opens the bytes of a signed request. */
    InputStream get(JsonNode signed) {
        HttpResponse<InputStream> answer = send(signed(signed).timeout(CALL).GET().build(), BodyHandlers.ofInputStream());
        if (answer.statusCode() == 200) {
            return answer.body();
        }
        close(answer.body());
        throw refused(answer.statusCode());
    }

    private static LfsException refused(int status) {
        return new LfsException.Refused("HTTP " + status, "S3 did not accept the signed request");
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

    private <T> HttpResponse<T> send(HttpRequest request, BodyHandler<T> handler) {
        IOException last = null;
        for (int attempt = 1; attempt <= ATTEMPTS; attempt++) {
            try {
                HttpResponse<T> answer = http.send(request, handler);
                if (!again(answer.statusCode())) {
                    return answer;
                }
                last = new IOException("HTTP " + answer.statusCode());
                if (answer.body() instanceof InputStream body) {
                    close(body);
                }
            } catch (IOException error) {
                last = error;
            } catch (InterruptedException error) {
                throw new InterruptException(error);
            }
            if (attempt < ATTEMPTS) {
                pause(attempt);
            }
        }
        String place = request.uri().getScheme() + "://" + request.uri().getAuthority();
        throw new LfsException.Unavailable(place + " does not answer: " + last, last);
    }

    private static boolean again(int status) {
        return status == 429 || status >= 500;
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
