-- fire: claims due timers. Allowed when Redis is full.
--
-- KEYS  an item: head, routes, timers, queue.
-- ARGV  retry base ms, retry max ms, retry jitter, incarnations of nodes that are gone ("node incarnation", NUL between
--       them; '': none); then an item: member (app NUL user).
-- Reply now, then an item:
--       {'N'}  not due, or none of its devices is
--       {'C', claimed score, ms since it was due, number of due devices that were put off, then for each other due
--             device: name, node, incarnation, connection, number of the re-send, its oldest unacknowledged entry if
--             that is sampled else ''}  claimed
--       {'U'}  looked at again after retry max
--       {'E', text}
--
-- A device that is not behind or has no route is disarmed. A due device gets its next due time, which is the claim. A
-- device whose node is gone is put off for retry max here, as defer would with 'V': then nobody has to be asked,
-- and the sessions of a lost node, which may be thousands, cost one script call instead of two and a dispatcher.

RETRY_BASE, RETRY_JITTER = tonumber(ARGV[1]), tonumber(ARGV[3])
local RETRY_MAX = tonumber(ARGV[2])
local LONGEST_BACKOFF = RETRY_MAX * (1 + RETRY_JITTER)
local NOT_DUE, CLAIMED = 'N', 'C'
local GONE, any_gone = {}, ARGV[4] ~= ''
for incarnation in string.gmatch(ARGV[4], '%Z+') do GONE[incarnation] = true end
-- What is decided about a device.
local RESEND, PUT_OFF = 1, 2

-- A time too far ahead is due as well: a clock was ahead when it was written.
local function is_due(at)
  return at <= NOW or at > NOW + LONGEST_BACKOFF
end

-- Sets the device's next due time. Returns RESEND, PUT_OFF (its node is gone), or nil (nothing is due).
local function decide(mailbox, device, route)
  if not route or device.seq >= mailbox.newest then
    disarm_device(device)
  elseif device.due_at == 0 then
    arm_device(device)
  elseif not is_due(device.due_at) then
    return nil
  elseif any_gone and GONE[match(route, '^%S+ %d+')] then
    device.due_at, device.defers = NOW + spread(RETRY_MAX), min(device.defers + 1, BYTE_MAX)
    return PUT_OFF
  else
    device.resends = min(device.resends + 1, BYTE_MAX)
    device.due_at = NOW + spread(min(RETRY_BASE * 2 ^ min(device.resends, 30), RETRY_MAX))
    return RESEND
  end
end

-- The entry that the device acknowledges next, if its trace is sampled: its last field is then
-- Envelope.traceparent, 55 bytes that end in the flags. Else ''.
local function sampled_entry(mailbox, device)
  local seq = max(device.seq + 1, mailbox.oldest)
  local body = call('LINDEX', mailbox.queue, int((seq - mailbox.oldest) * 2 + 1))
  if not body or not match(body, 'z7%x%x%-%x+%-%x+%-%x[13579bdf]$') then return '' end
  return sub(header_at(mailbox, seq), 1, HEADER_BYTES) .. body
end

local function fire(key_at, arg_at)
  local head, routes, timers, queue =
    KEYS[key_at], KEYS[key_at + 1], KEYS[key_at + 2], KEYS[key_at + 3]
  local member = ARGV[arg_at]
  local score = tonumber(call('ZSCORE', timers, member))
  if not score or not is_due(score) then return { NOT_DUE } end
  local mailbox = find_mailbox(head, queue)
  if not mailbox then
    call('ZREM', timers, member)
    return { NOT_DUE }
  end
  local late = score <= NOW and NOW - score or 0
  local reply, devices, put_off = { CLAIMED, '0', int(late), '0' }, other_devices(mailbox), 0
  for _, device in ipairs(devices) do
    local route_text = call('HGET', routes, device.name)
    local due_at, resends = device.due_at, device.resends
    local decision = decide(mailbox, device, route_text)
    if decision == PUT_OFF then put_off = put_off + 1 end
    if decision == RESEND then
      local route = parse_route(route_text)
      for _, part in ipairs({ device.name, route.node, route.incarnation, route.connection,
        int(device.resends), sampled_entry(mailbox, device) }) do
        reply[#reply + 1] = part
      end
    end
    if device.due_at ~= due_at or device.resends ~= resends then save_device(mailbox, device) end
  end
  reply[2], reply[4] = int(set_timer(timers, member, devices)), int(put_off)
  return (#reply > 4 or put_off > 0) and reply or { NOT_DUE }
end

-- A mailbox that this version must not touch would be due at each poll and delay the others.
local function postpone_unknown(key_at, arg_at)
  call('ZADD', KEYS[key_at + 2], int(NOW + spread(RETRY_MAX)), ARGV[arg_at])
end

return each(#KEYS / 4, fire, 4, 1, 5, postpone_unknown)
