package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import java.util.concurrent.CompletionException;
import org.apache.kafka.common.config.ConfigException;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class BrokerClientTest {
    private final MockServer server;

    BrokerClientTest() throws IOException {
        server = new MockServer();
    }

    @AfterEach
    void closeServer() {
        server.close();
    }

    @Test
    void theResponseTimeoutDoesNotLimitTheBodyOfADownload() throws IOException {
        server.on("GET /object", server.slowly("hello", 150));
        try (InputStream body = server.client(Duration.ofMillis(400)).get(server.presigned("GET", "/object"))) {
            assertArrayEquals("hello".getBytes(StandardCharsets.UTF_8), body.readAllBytes());
        }
        assertEquals(1, server.count("GET /object"));
    }

    @Test
    void aDownloadWhoseHeadersTimeOutIsRetried() throws IOException {
        server.on("GET /object", server.noResponse(), MockServer.text(200, "hello"));
        try (InputStream body = server.client(Duration.ofMillis(400)).get(server.presigned("GET", "/object"))) {
            assertArrayEquals("hello".getBytes(StandardCharsets.UTF_8), body.readAllBytes());
        }
        assertEquals(2, server.count("GET /object"));
    }

    @Test
    void aBrokerResponseThatStallsIsRetried() {
        server.on("GET /lfs/uploads/1", server.slowly("{\"state\":\"open\"}", 200), MockServer.text(200, "{\"state\":\"open\"}"));
        assertEquals("open", server.client(Duration.ofMillis(400)).call("GET", "/lfs/uploads/1", null, null).path("state").asText());
        assertEquals(2, server.count("GET /lfs/uploads/1"));
    }

    /** The JDK's HTTP client quotes an invalid header in its error message, so the token must be checked before. */
    @ParameterizedTest
    @ValueSource(strings = {"\uFEFFsecret", "secret\nsecret", "secret secret", "sécret", ""})
    void anInvalidTokenInAFileIsNotQuotedInTheError(String token, @TempDir Path directory) throws IOException {
        Path file = Files.writeString(directory.resolve("token"), token);
        var settings = Map.of("lfs.broker.token.file", file.toString(), "lfs.broker.url", server.url());
        BrokerClient broker = new BrokerClient(new LfsConfig(settings));
        LfsException error = assertThrows(LfsException.Unavailable.class, () -> broker.call("GET", "/lfs/uploads/1", null, null));
        assertFalse((error + " " + error.getCause()).contains("cret"), error.toString());
        Throwable policyError = assertThrows(CompletionException.class, () -> broker.policy("t").join()).getCause();
        assertInstanceOf(LfsException.Unavailable.class, policyError);
    }

    /** A file may contain a valid token later. A setting does not change, so a retry cannot help. */
    @ParameterizedTest
    @ValueSource(strings = {"\uFEFFsecret", "secret\nsecret", "secret secret", "sécret", ""})
    void anInvalidTokenInASettingIsRejectedBeforeAnyRequest(String token) {
        var settings = Map.of("lfs.broker.token", token, "lfs.broker.url", server.url());
        ConfigException error = assertThrows(ConfigException.class, () -> new LfsConfig(settings));
        assertFalse(error.toString().contains("cret"), error.toString());
    }
}
