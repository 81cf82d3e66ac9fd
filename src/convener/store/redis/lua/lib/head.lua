-- The head in KEYS[1]: a table of strings by field, or nil. FIELDS is the order of META_FIELDS in replies.py, hot
-- fields first, because a small hash is searched from its beginning.
local FIELDS = {'owner', 'epoch', 'seq', 'batch', 'cursor', 'position', 'done', 'base', 'status', 'nonce', 'updated',
  'strikes', 'struck', 'strike_at', 'user', 'generation', 'created', 'metadata', 'halted', 'asks',
  'archived', 'archived_epoch', 'manifest'}
local function read_head()
  local values = redis.call('HMGET', KEYS[1], unpack(FIELDS))
  if not values[16] then return nil end
  local head = {}
  for i, name in ipairs(FIELDS) do head[name] = values[i] or '0' end
  -- A head of a node that knows no archive has no such field; a name, unlike a number, is not 0 then.
  head.manifest = values[23] or ''
  return head
end
local function listed(head)
  local values = {}
  for i, name in ipairs(FIELDS) do values[i] = head[name] end
  return values
end
local function write_head(head)
  local pairs_ = {}
  for _, name in ipairs(FIELDS) do
    pairs_[#pairs_ + 1] = name
    pairs_[#pairs_ + 1] = head[name]
  end
  redis.call('HSET', KEYS[1], unpack(pairs_))
end
