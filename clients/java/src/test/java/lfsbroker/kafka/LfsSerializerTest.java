package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.fasterxml.jackson.databind.JsonNode;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class LfsSerializerTest {
    private static final byte[] HELLO = "hello".getBytes(StandardCharsets.UTF_8);
    private static final String EXPIRED = "<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>";
    private static final String COMPLETED = "{\"state\":\"published\",\"pointer\":{\"kfs_lfs\":1}}";
    private static final String POINTER = "{\"kfs_lfs\":1}";

    private final MockServer server;

    LfsSerializerTest() throws IOException {
        server = new MockServer();
        server.on("POST /lfs/uploads/1/complete", MockServer.text(200, COMPLETED)).on("DELETE /lfs/uploads/1", MockServer.text(200, "{}"));
    }

    @AfterEach
    void closeServer() {
        server.close();
    }

    private String serialized(byte[] value) {
        try (LfsSerializer<byte[]> serializer = server.serializer()) {
            return new String(serializer.serialize("t", value), StandardCharsets.UTF_8);
        }
    }

    private MockServer.Response singlePut(String path) {
        return MockServer.text(201, "{\"id\":\"1\",\"state\":\"open\",\"mode\":\"single\",\"upload\":" + server.presigned("PUT", path) + "}");
    }

    /** The part URLs that open returned have expired; only the most recent URL is valid. */
    @Test
    void eachPartUsesAFreshUrl() throws IOException {
        var validPart = new int[1];
        StringBuilder expiredParts = new StringBuilder();
        for (int number = 1; number <= 5; number++) {
            expiredParts.append(number == 1 ? "" : ",").append(part(number));
            int thisPart = number;
            server.on("PUT /part/" + number, (exchange, body) -> MockServer.send(exchange, thisPart == validPart[0] ? 200 : 403, ""));
        }
        server.on("POST /lfs/uploads", MockServer.text(
                201, "{\"id\":\"1\",\"state\":\"open\",\"mode\":\"multipart\",\"part_count\":5,\"parts\":[" + expiredParts + "]}"));
        server.on("POST /lfs/uploads/1/parts", (exchange, body) -> {
            JsonNode numbers = BrokerClient.MAPPER.readTree(body).path("part_numbers");
            StringBuilder parts = new StringBuilder();
            for (JsonNode number : numbers) {
                validPart[0] = number.asInt();
                parts.append(parts.isEmpty() ? "" : ",").append(part(number.asInt()));
            }
            MockServer.send(exchange, 200, "{\"parts\":[" + parts + "]}");
        });
        assertEquals(POINTER, serialized(new byte[(64 << 20) + 1]));
        for (int number = 1; number <= 5; number++) {
            assertEquals(1, server.count("PUT /part/" + number), server.requests.toString());
        }
    }

    private String part(int number) {
        int offset = (number - 1) * (16 << 20);
        return "{\"part_number\":" + number + ",\"offset\":" + offset + ",\"size\":" + Math.min(16 << 20, (64 << 20) + 1 - offset)
                + ",\"method\":\"PUT\",\"url\":\"" + server.url() + "/part/" + number + "\"}";
    }

    @ParameterizedTest
    @CsvSource({"403,''", "400," + EXPIRED})
    void anExpiredUrlIsPresignedOnceMore(int status, String body) {
        List<String> openRequests = new CopyOnWriteArrayList<>();
        MockServer.Response second = singlePut("/second");
        server.on(
                "POST /lfs/uploads",
                (exchange, requestBody) -> {
                    String key = exchange.getRequestHeaders().getFirst("idempotency-key");
                    openRequests.add(key + new String(requestBody, StandardCharsets.UTF_8));
                    (openRequests.size() == 1 ? singlePut("/first") : second).send(exchange, requestBody);
                });
        server.on("PUT /first", MockServer.text(status, body)).on("PUT /second", MockServer.text(200, ""));
        assertEquals(POINTER, serialized(HELLO));
        // The same key and body, so that the broker returns the same upload.
        assertEquals(2, openRequests.size());
        assertEquals(openRequests.get(0), openRequests.get(1));
    }

    @Test
    void anUploadThatS3RejectsFailsAndIsAborted() {
        server.on("POST /lfs/uploads", singlePut("/object"));
        server.on("PUT /object", MockServer.text(400, EXPIRED));
        assertEquals("ExpiredToken", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(2, server.count("PUT /object"));
        server.on("PUT /object", MockServer.text(400, "<Error><Code>BadDigest</Code></Error>"));
        assertEquals("BadDigest", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(3, server.count("PUT /object"));
        assertEquals(2, server.count("DELETE /lfs/uploads/1"));
    }

    @Test
    void anUploadThatExpiredMeanwhileFails() {
        server.on("POST /lfs/uploads", singlePut("/object"), MockServer.text(200, "{\"id\":\"1\",\"state\":\"expired\"}"));
        server.on("PUT /object", MockServer.text(403, ""));
        assertEquals("expired", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
    }

    @Test
    void requestsWhoseOutcomeIsUndecidedAreRetried() {
        MockServer.Response inFlight = MockServer.text(409, "{\"code\":\"idempotency-in-flight\"}");
        server.on("POST /lfs/uploads", inFlight, singlePut("/object"));
        server.on("PUT /object", MockServer.text(409, "<Error><Code>ConditionalRequestConflict</Code></Error>"), MockServer.text(200, ""));
        assertEquals(POINTER, serialized(HELLO));
        assertEquals(2, server.count("POST /lfs/uploads"));
        assertEquals(2, server.count("PUT /object"));
    }

    @Test
    void aConflictOfAnotherRequestIsNotRetried() {
        server.on("POST /lfs/uploads", singlePut("/object")).on("PUT /object", MockServer.text(200, ""));
        server.on("POST /lfs/uploads/1/complete", MockServer.text(409, "{\"code\":\"object-missing\"}"));
        assertEquals("object-missing", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(1, server.count("POST /lfs/uploads/1/complete"));
    }

    @Test
    void anUnavailableBrokerIsNotAskedToAbort() {
        server.on("POST /lfs/uploads", singlePut("/object")).on("PUT /object", MockServer.text(200, ""));
        server.on("POST /lfs/uploads/1/complete", MockServer.text(503, "{}"));
        assertThrows(LfsException.Unavailable.class, () -> serialized(HELLO));
        assertEquals(0, server.count("DELETE /lfs/uploads/1"));
    }

    @Test
    void thePartCountOfTheLargestArrayDoesNotOverflow() {
        assertEquals(5, LfsSerializer.partCount((64 << 20) + 1));
        assertEquals(128, LfsSerializer.partCount(Integer.MAX_VALUE - 8));
        assertTrue(127L * (16 << 20) < Integer.MAX_VALUE, "the last part's offset must fit into an int");
    }
}
