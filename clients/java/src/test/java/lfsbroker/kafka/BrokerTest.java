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

class BrokerTest {
    private final Stranger stranger;

    BrokerTest() throws IOException {
        stranger = new Stranger();
    }

    @AfterEach
    void end() {
        stranger.close();
    }

    @Test
    void aBodyMayTakeLongerThanItsHeaders() throws IOException {
        stranger.on("GET /object", stranger.slowly("hello", 150));
        try (InputStream body = stranger.broker(Duration.ofMillis(400)).get(stranger.signed("GET", "/object"))) {
            assertArrayEquals("hello".getBytes(StandardCharsets.UTF_8), body.readAllBytes());
        }
        assertEquals(1, stranger.count("GET /object"));
    }

    @Test
    void headersThatDoNotComeAreAskedForAgain() throws IOException {
        stranger.on("GET /object", stranger.silence(), Stranger.text(200, "hello"));
        try (InputStream body = stranger.broker(Duration.ofMillis(400)).get(stranger.signed("GET", "/object"))) {
            assertArrayEquals("hello".getBytes(StandardCharsets.UTF_8), body.readAllBytes());
        }
        assertEquals(2, stranger.count("GET /object"));
    }

    @Test
    void anAnswerOfTheBrokerThatStandsStillIsAskedForAgain() {
        stranger.on("GET /lfs/uploads/1", stranger.slowly("{\"state\":\"open\"}", 200), Stranger.text(200, "{\"state\":\"open\"}"));
        assertEquals("open", stranger.broker(Duration.ofMillis(400)).call("GET", "/lfs/uploads/1", null, null).path("state").asText());
        assertEquals(2, stranger.count("GET /lfs/uploads/1"));
    }

    /** The JDK's HTTP client quotes a header that it does not send. */
    @ParameterizedTest
    @ValueSource(strings = {"\uFEFFsecret", "secret\nsecret", "secret secret", "sécret", ""})
    void aTokenThatIsNoneIsNotQuoted(String token, @TempDir Path directory) throws IOException {
        Path file = Files.writeString(directory.resolve("token"), token);
        var settings = Map.of("lfs.broker.token.file", file.toString(), "lfs.broker.url", stranger.url());
        Broker broker = new Broker(new LfsConfig(settings));
        LfsException error = assertThrows(LfsException.Unavailable.class, () -> broker.call("GET", "/lfs/uploads/1", null, null));
        assertFalse((error + " " + error.getCause()).contains("cret"), error.toString());
        Throwable advice = assertThrows(CompletionException.class, () -> broker.policy("t").join()).getCause();
        assertInstanceOf(LfsException.Unavailable.class, advice);
    }

    /** A file may hold another one later; a setting stays what it is, and trying again does not help. */
    @ParameterizedTest
    @ValueSource(strings = {"\uFEFFsecret", "secret\nsecret", "secret secret", "sécret", ""})
    void aSettingThatIsNoTokenIsRefusedBeforeAnythingIsAsked(String token) {
        var settings = Map.of("lfs.broker.token", token, "lfs.broker.url", stranger.url());
        ConfigException error = assertThrows(ConfigException.class, () -> new LfsConfig(settings));
        assertFalse(error.toString().contains("cret"), error.toString());
    }
}
